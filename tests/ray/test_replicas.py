"""Replicas under Ray Serve: who answers what, and what is left of requests when one dies.

Slow, in an environment of its own: `make test-ray`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.serve.settings import Settings
from tests.ray.load import TOKENS, Load
from tests.support.paths import REPOSITORY
from tests.support.server import MODEL, events, wait_until

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="Ray has an environment of its own: make test-ray")

APP = "fusionroute"
PATIENT = {  # seconds that Ray waits for its own processes, which other work may hold up
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
    "RAY_worker_register_timeout_seconds": "300",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def patient() -> Iterator[None]:
    """For all processes that a test starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, seconds in PATIENT.items():
            patch.setenv(name, seconds)
        yield


@pytest.fixture(scope="module")
def url(bundles: list[Path], patient: None) -> Iterator[str]:
    """Two replicas on a cluster of this machine alone."""
    from ray import serve

    from examples.ray_serve import build

    port = free_port()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = Settings(MODEL, sessions=2, queue=64, body_bytes=1 << 16)
        serve.run(build(bundles[0], settings, 2, {"num_cpus": 0}, precision="fp32", device="cpu", threads=1), name=APP)
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def texts(bundles: list[Path]) -> dict[tuple[str, int], str]:
    """What a run alone gives."""
    prompts = ["12+30=", "print(", "Once upon a time", "12+31=", "x" * 40]
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        options: Any = {"temperature": 0.9, "ignore_eos": True}
        return {(prompt, seed): rt.generate(prompt, TOKENS, seed=seed, **options).text for prompt in prompts for seed in range(3)}


def complete(url: str, prompt: Any, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": prompt, "temperature": 0, **fields}, timeout=60)


def test_a_replica_answers_as_the_app_alone(url: str, texts: dict[tuple[str, int], str]) -> None:
    load = Load(url, texts)
    with load.running(4):
        load.wait(40)
    assert load.faults == [] and {"whole", "streamed"} == {each.kind for each in load.outcomes}
    assert {each.attempt for each in load.outcomes} == {1} and len({each.replica for each in load.outcomes}) == 2
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == MODEL
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_what_the_app_refuses_is_refused_alike(url: str) -> None:
    assert complete(url, "1", sufix="").json()["error"]["message"] == "Unknown argument: sufix."
    assert complete(url, "x" * (1 << 17)).status_code == 413
    chunked = httpx.post(f"{url}/v1/completions", content=iter([b"x" * (1 << 16)] * 4), headers={"Content-Type": "application/json"})
    assert (chunked.status_code, chunked.json()["error"]["message"]) == (413, "The request has more than 65536 bytes: send a shorter one.")
    rebound = httpx.get(f"{url}/v1/models", headers={"Host": "evil.example"})
    assert rebound.status_code == 403


def test_prompts_that_begin_alike_go_to_the_replica_that_has_read_them(url: str) -> None:
    answered: list[set[str]] = []
    for text in range(10):
        beginning = [5 + (text * 7 + number) % 90 for number in range(200)]
        answers = [complete(url, [*beginning, ending], max_tokens=1) for ending in (7, 8, 9)]
        answered.append({answer.headers["x-replica"] for answer in answers})
    assert {len(replicas) for replicas in answered} == {1}
    assert len(set.union(*answered)) == 2  # or chance gave all texts to one: once in 512 runs


def test_a_client_that_leaves_frees_its_session(url: str) -> None:
    """Ten clients leave long texts; four sessions are all that there are."""
    for _ in range(10):
        body = {"model": MODEL, "prompt": "1", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())

    def running() -> set[float]:
        lines = [line for _ in range(8) for line in httpx.get(f"{url}/metrics").text.splitlines()]
        return {float(line.split()[1]) for line in lines if line.startswith("fusionroute_requests_running ")}

    wait_until(lambda: running() == {0.0}, 60)


def replica_processes() -> list[psutil.Process]:
    title = f"ray::ServeReplica:{APP}:Replica"
    return [process for process in psutil.process_iter(["cmdline"]) if " ".join(process.info["cmdline"] or []).startswith(title)]


def test_a_replica_is_killed_under_load(url: str, texts: dict[tuple[str, int], str]) -> None:
    """What can be sent again is answered, by another replica; a stream that was begun ends with an error."""
    load = Load(url, texts)
    with load.running(12):  # more than sessions, so that some wait in the victim's queue
        load.wait(80)
        before = {each.replica for each in load.outcomes}
        victim = replica_processes()[0]
        killed = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        wait_until(lambda: load.faults or any(each.replica not in before for each in load.outcomes), 300)
        load.wait(80)
    back = min((each.end for each in load.outcomes if each.replica not in before), default=time.monotonic())
    print(load.report(killed, back))
    assert load.faults == []
    lost = [each for each in load.outcomes if each.kind == "cut"]
    assert all(each.begin < killed < each.end for each in lost) and len({each.replica for each in lost}) <= 1
    assert any(each.attempt == 2 for each in load.outcomes) and max(each.attempt for each in load.outcomes) == 2
    assert len(before) == 2 and len(replica_processes()) == 2


def test_the_command_lets_a_text_end_at_sigterm(bundles: list[Path], patient: None) -> None:
    port = free_port()
    command = [sys.executable, "examples/ray_serve.py", str(bundles[0]), "2", str(port)]
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY), "RAY_ADDRESS": "local"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:

        def healthy() -> bool:
            assert process.poll() is None
            try:
                return httpx.get(f"{url}/health").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(healthy, 400)
        body = {"model": bundles[0].name, "prompt": "1", "max_tokens": 800, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            *_, last = list(events(lines))
        assert last["choices"][0]["finish_reason"] == "length", json.dumps(last)
        process.wait(120)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    finally:
        process.kill()
