"""Clients that leave, a full queue, time that is over, and shutting down."""

import gc
import json
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.decoder import Decoder
from tests.runtime.commands.conftest import runtime_status
from tests.support.commands import Command
from tests.support.server import MODEL, Served, events, served, wait_until

LONG: dict[str, Any] = {"prompt": "12+30=", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every step takes so many seconds more."""
    seconds, advance = [0.02], Decoder.advance

    def delayed(self: Decoder, *arguments: Any) -> Any:
        time.sleep(seconds[0])
        return advance(self, *arguments)

    monkeypatch.setattr(Decoder, "advance", delayed)
    return seconds


def stream(server: Served, **fields: Any) -> Any:
    return httpx.stream("POST", server.url + "/v1/completions", json={"model": MODEL, "stream": True} | LONG | fields, timeout=60)


def test_a_client_that_leaves_frees_its_session_within_a_token(server: Served, slow: list[float]) -> None:
    with stream(server) as answer:
        lines = events(answer.iter_lines())
        for _ in range(3):
            next(lines)
        assert server.server.admission.running == 1
    wait_until(lambda: server.idle)
    before = server.metric("generated_tokens_total")
    time.sleep(0.2)
    assert server.metric("generated_tokens_total") == before < 400
    with sent(server, LONG):  # not streamed
        wait_until(lambda: server.metric("generated_tokens_total") > before + 1)
    wait_until(lambda: server.idle)
    assert server.metric("generated_tokens_total") - before < 400


def test_beyond_the_queue_comes_429_and_those_that_leave_it_make_room(bundles: list[Path], slow: list[float]) -> None:
    with served(FusionRuntime.load(bundles[0], precision="fp32"), sessions=1, queue=1) as running:
        with stream(running) as first:
            lines = events(first.iter_lines())
            next(lines)
            with sent(running, {"prompt": "1"}):
                wait_until(lambda: running.server.admission.waiting == 1)
                refused = running.complete("1")
                assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
                assert refused.json()["error"]["code"] == "queue_full"
            wait_until(lambda: running.server.admission.waiting == 0)
            assert running.server.admission.running == 1
        wait_until(lambda: running.idle)
        slow[0] = 0.0
        assert running.complete("1", max_tokens=2).status_code == 200


def test_a_connection_that_is_reset_leaves_nothing(bundles: list[Path]) -> None:
    with served(FusionRuntime.load(bundles[0], precision="fp32")) as running:
        with connected(running) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert client.recv(1) == b"H"
            wait_until(lambda: running.uvicorn.server_state.total_requests == 1)
            [connection] = running.uvicorn.server_state.connections
            left = weakref.ref(connection)
            del connection
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
        wait_until(lambda: gc.collect() >= 0 and left() is None)


def connected(running: Served) -> socket.socket:
    host, _, port = running.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)))


@contextmanager
def sent(running: Served, fields: dict[str, Any]) -> Iterator[None]:
    """A request of a client that leaves at the end without an answer."""
    body = json.dumps({"model": MODEL} | fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with connected(running) as connection:
        connection.sendall(head.encode() + body)
        yield


def test_time_is_over(bundles: list[Path], slow: list[float]) -> None:
    """The text so far is answered, and said to be cut."""
    with served(FusionRuntime.load(bundles[0], precision="fp32"), sessions=1, seconds=2.0) as running:
        answer = running.complete(**LONG).json()
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "length" and choice["fusionroute"] == {"finish_reason": "deadline"}
        assert answer["usage"]["completion_tokens"] < 900


def test_the_end_waits_for_texts_and_then_cancels_them(bundles: list[Path], slow: list[float]) -> None:
    with served(FusionRuntime.load(bundles[0], precision="fp32"), sessions=2, drain_seconds=3.0) as running:
        with stream(running, max_tokens=5) as short, stream(running) as long:
            ends = []
            lines = [events(answer.iter_lines()) for answer in (short, long)]
            for each in lines:
                next(each)
            running.stop()
            wait_until(lambda: running.server.admission.draining)
            for each in lines:
                *_, last = list(each)
                ends.append(last["choices"][0])
        assert ends[0]["finish_reason"] == "length" and "fusionroute" not in ends[0]
        assert ends[1]["finish_reason"] == "stop" and ends[1]["fusionroute"] == {"finish_reason": "cancelled"}
        running.thread.join(10)
        with pytest.raises(httpx.ConnectError):
            running.complete("1")


def test_the_command_serves_logs_no_prompt_and_ends_at_sigterm(bundles: list[Path]) -> None:
    command = [sys.executable, "-m", "runtime", "serve", str(bundles[0]), "--port", "0", "--precision", "fp32", "--model", MODEL]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None and process.stdout is not None
    try:
        line = process.stderr.readline()
        assert line.startswith(f"{MODEL} is served at http://127.0.0.1:")
        url = line.split()[-1]
        answer = httpx.post(
            f"{url}/completions", json={"model": MODEL, "prompt": "SECRET", "max_tokens": 3, "ignore_eos": True}, timeout=60
        )
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    finally:
        process.kill()
    lines = process.stderr.read()
    assert process.stdout.read() == "" and "SECRET" not in lines
    told = json.loads(lines.splitlines()[0])
    assert (told["path"], told["status"], told["completion_tokens"], told["finish"]) == ("/v1/completions", 200, 3, "length")
    assert told["request"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--host", "0.0.0.0"], "error: 0.0.0.0 is reached from other machines: give a key with --api-key or FUSIONROUTE_API_KEY, or say --insecure.\n"),
        (["--host", "203.0.113.1", "--insecure"], "error: 203.0.113.1 port 8000 cannot be listened at (Cannot assign requested address): choose another with --host and --port.\n"),
        (["--precision", "int8,fp8"], "error: The bundle {} has no precision 'fp8', only fp32, int8: export it with --precision fp8.\n"),
    ],
)  # fmt: skip
def test_the_command_refuses_in_one_sentence(
    bundles: list[Path], options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = Command("runtime", runtime_status, monkeypatch, capsys)("serve", bundles[0], *options)
    assert (ended.status, ended.out, ended.err) == (1, "", sentence.format(bundles[0]))
