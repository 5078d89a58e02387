"""One runtime in many threads: the same tokens as in one, an end for all when it is closed, no memory that grows."""

import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import BusyError, ClosedError, FusionError, FusionRuntime
from fusionroute.runtime.decoder import Decoder

PROMPT = "12+30= and more"


def test_a_session_in_each_thread_gives_what_one_thread_gives(bundles: list[Path]) -> None:
    for folder in bundles:
        with FusionRuntime.load(folder, threads=1) as rt:

            def text(number: int, rt: FusionRuntime = rt) -> list[int]:
                session = rt.session()
                session.append(rt.encode(f"{number}+{PROMPT}"))
                tokens = [session.step().id for _ in range(10)]
                session.rewind(5)
                return [*tokens, *(session.step(temperature=1.0, seed=number).id for _ in range(10))]

            expected = [text(number) for number in range(4)]
            results: dict[int, list[int]] = {}
            start = threading.Barrier(4)

            def work(number: int, start: threading.Barrier = start, results: dict[int, list[int]] = results) -> None:
                start.wait()
                results[number] = text(number)

            workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            assert [results[number] for number in range(4)] == expected


@pytest.mark.parametrize("number", [0, 2])
def test_a_second_thread_is_told_that_a_session_is_in_use(bundles: list[Path], number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, leave = threading.Event(), threading.Event()
    advance = Decoder.advance

    def held(decoder: Decoder, *arguments: Any) -> Any:
        inside.set()
        assert leave.wait(60)
        return advance(decoder, *arguments)

    with FusionRuntime.load(bundles[number], threads=1) as rt:
        session, alone = rt.session(), rt.session()
        for each in (session, alone):
            each.append([3, 4, 5])
        expected = [alone.step().id for _ in range(2)]
        session.step()
        monkeypatch.setattr(Decoder, "advance", held)
        tokens: list[int] = []
        worker = threading.Thread(target=lambda: tokens.append(session.step().id))
        worker.start()
        assert inside.wait(60)
        uses: list[Callable[[], object]] = [
            session.step, lambda: session.steps(2), lambda: session.append([7]), lambda: session.rewind(1), session.clear, lambda: session.logits,
        ]  # fmt: skip
        for use in uses:
            with pytest.raises(BusyError) as caught:
                use()
            assert str(caught.value) == "This session is in use, by another thread or by the caller: give each thread a session of its own."
        assert len(session) == 4 and repr(session)
        leave.set()
        worker.join()
        assert session.token_ids == [3, 4, 5, *expected] and tokens == expected[1:]


def test_a_second_thread_is_told_that_a_stream_is_in_use(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    inside, leave = threading.Event(), threading.Event()
    advance = Decoder.advance_some

    def held(decoder: Decoder, *arguments: Any) -> Any:
        inside.set()
        assert leave.wait(60)
        return advance(decoder, *arguments)

    with FusionRuntime.load(bundles[0], threads=1) as rt:
        expected = rt.generate([3, 4, 5], 3)
        monkeypatch.setattr(Decoder, "advance_some", held)
        stream = rt.stream([3, 4, 5], 3)
        tokens: list[int] = []
        worker = threading.Thread(target=lambda: tokens.extend(token.id for token in stream))
        worker.start()
        assert inside.wait(60)
        for use in (lambda: next(stream), stream.close):
            with pytest.raises(BusyError) as caught:
                use()
            assert str(caught.value) == "This stream is in use, by another thread or by the caller: give each thread a stream of its own."
        leave.set()
        worker.join()
        assert tokens == expected.token_ids and stream.finish_reason == "length"


def test_every_stream_gives_its_decoder_back_once(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with FusionRuntime.load(bundles[0], threads=1) as rt:
        idle = rt._sets.current.pool.idle
        for end in ("never begun", "closed", "closed twice", "dropped", "dropped under way", "closed under way", "ended", "failed"):
            stream = rt.stream([3, 4, 5], 3)
            assert not idle, end
            if "under way" in end:
                next(stream)
            if end == "failed":
                monkeypatch.setattr(Decoder, "advance_some", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    next(stream)
            elif end == "ended":
                assert len(list(stream)) == 3 and not list(stream)
            for _ in range({"closed": 1, "closed twice": 2, "closed under way": 1}.get(end, 0)):
                stream.close()
            del stream
            assert len(idle) == 1, end


def until_closed(use: Callable[[], object], started: threading.Barrier, ends: list[str]) -> None:
    """Use a runtime until it is closed, and note how that ended."""
    started.wait()
    try:
        while True:
            use()
    except FusionError as error:
        ends.append(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("repeats", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_closing_under_way_ends_every_thread_with_an_error(bundles: list[Path], repeats: int) -> None:
    delay = random.Random(0)
    for repeat in range(repeats):
        rt = FusionRuntime.load(bundles[repeat % 2], threads=1)
        session = rt.session()
        session.append([3, 4])

        def step(session: object = session) -> None:
            assert hasattr(session, "step") and hasattr(session, "rewind")
            session.step()
            session.rewind(2)

        uses: list[Callable[[], object]] = [
            step,
            lambda rt=rt: rt.generate(PROMPT, 20),  # type: ignore[misc]
            lambda rt=rt: list(rt.stream([5] * 300, 5, deadline=60)),  # type: ignore[misc]
            lambda rt=rt: rt.score([3] * 40, chunk=7),  # type: ignore[misc]
        ]
        started, ends = threading.Barrier(len(uses) + 1), list[str]()
        workers = [threading.Thread(target=until_closed, args=(use, started, ends), daemon=True) for use in uses]
        for worker in workers:
            worker.start()
        started.wait()
        threading.Event().wait(delay.uniform(0, 0.05))
        rt.close()
        del rt, session, step, uses
        for worker in workers:
            worker.join(60)
        assert ends == [f"{ClosedError.__name__}: The runtime was closed: load the bundle again."] * len(workers)


SOAK = """
import gc, sys, threading
from pathlib import Path
from fusionroute import FusionRuntime

def memory():
    gc.collect()
    return int(next(line.split()[1] for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Private_Dirty:")))

def request(number):
    kind, prompt = number % 5, f"{number % 90 + 10}+{number % 70 + 10}="
    if kind == 0:
        rt.generate(prompt, 8)
    elif kind == 1:
        rt.generate(prompt, 8, temperature=0.8, top_p=0.9, seed=number, repetition_penalty=1.1)
    elif kind == 2:
        rt.generate(prompt, 8, on_token=lambda token: False)
    elif kind == 3:
        cancel = threading.Event()
        cancel.set()
        rt.generate([5] * 40, 8, cancel=cancel)
        rt.generate([5] * 40, 2, deadline=60)
    else:
        session = rt.session()
        session.append(rt.encode(prompt))
        rows = [(session.step(), session.logits) for _ in range(4)]

with FusionRuntime.load(sys.argv[1], threads=1) as rt:
    for number in range(250):
        request(number)
    warm = memory()
    for number in range(int(sys.argv[2])):
        request(number)
    print(warm, memory())
"""


@pytest.mark.parametrize("requests", [250, pytest.param(2000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_requests(bundles: list[Path], requests: int) -> None:
    done = subprocess.run([sys.executable, "-c", SOAK, str(bundles[0]), str(requests)], capture_output=True, text=True, check=True)
    warm, after = map(int, done.stdout.split())
    assert after <= 1.01 * warm, f"{warm} KiB of its own after the first 250 requests, {after} KiB after {requests} more"
