"""The runtime inside other programs: callbacks, deadlines, cancellation, buffers, forks, and closing under way."""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime, InputError, Sampling
from fusionroute.runtime.backends.keys_values import zeros
from fusionroute.runtime.backends.ort_cpu import OrtCache
from fusionroute.runtime.cancellation import Cancellation, Interrupted
from fusionroute.runtime.limits import CHUNK
from fusionroute.runtime.process_memory import resident
from fusionroute.runtime.sampling import SamplingOptions
from fusionroute.runtime.stream import StreamOptions, TextOptions
from fusionroute.runtime.text import Token
from fusionroute.runtime.text_rules import RuleOptions, TextRules
from fusionroute.runtime.text_stream import TextStream

PROMPT = "12+30= and more"


@pytest.fixture(scope="module")
def rt(bundles: list[Path]) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(bundles[0], precision="fp32", threads=1) as runtime:
        yield runtime


def test_a_callback_is_given_what_the_iterator_gives(rt: FusionRuntime) -> None:
    called: list[Token] = []
    result = rt.generate(PROMPT, 12, on_token=called.append)
    assert called == list(rt.stream(PROMPT, 12)) and [token.id for token in called] == result.token_ids
    assert result.finish_reason == "length"


def test_a_callback_ends_the_text_by_false_or_by_what_it_raises(rt: FusionRuntime) -> None:
    whole = rt.generate(PROMPT, 12)
    seen: list[int] = []

    def three(token: Token) -> bool:
        seen.append(token.id)
        return len(seen) < 3

    cut = rt.generate(PROMPT, 12, on_token=three)
    assert cut.token_ids == seen == whole.token_ids[:3] and cut.finish_reason == "cancelled"
    free = len(rt._sets.current.pool.idle)
    with pytest.raises(ZeroDivisionError):
        rt.generate(PROMPT, 12, on_token=lambda token: 1 // 0)
    assert len(rt._sets.current.pool.idle) == free, "the session goes back"
    assert rt.generate(PROMPT, 12) == whole


class Clock:
    """time.monotonic that goes on by a second with every token, that is whenever the router runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        self.forward = OrtCache.forward

        def forward(cache: OrtCache, ids: Any, positions: Any) -> Any:
            self.now += cache._model.model.name == "router"
            return self.forward(cache, ids, positions)

        monkeypatch.setattr(OrtCache, "forward", forward)
        monkeypatch.setattr("fusionroute.runtime.cancellation.time.monotonic", lambda: self.now)


def test_a_deadline_is_kept_within_one_token(rt: FusionRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rt.generate(PROMPT, 12)
    Clock(monkeypatch)
    monkeypatch.setattr(
        "fusionroute.runtime.token_sequence.UNWATCHED_TOKENS", CHUNK
    )  # else the prompt is looked after by a thread of its own, which asks the same clock
    for seconds, count in ((0, 0), (-1, 0), (0.5, 1), (4, 4), (4.5, 5), (50, 12)):
        result = rt.generate(PROMPT, 12, deadline=seconds)
        assert result.token_ids == whole.token_ids[:count]
        assert result.finish_reason == ("deadline" if count < 12 else "length")
    for wrong in (float("nan"), "1", True):
        with pytest.raises(InputError, match=r"deadline is .*expected a number of seconds from now"):
            rt.generate(PROMPT, 3, deadline=wrong)  # type: ignore[arg-type]


def test_another_thread_cancels_within_one_token(rt: FusionRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel, seen = threading.Event(), threading.Event()
    chosen: list[Token] = []  # before the stream holds some back until their text is certain
    push = TextStream.push

    def record(self: TextStream, token: Token) -> list[Token]:
        chosen.append(token)
        return push(self, token)

    monkeypatch.setattr(TextStream, "push", record)

    def work() -> None:
        stream = rt.stream(PROMPT, 400, cancel=cancel, drafts=False)
        for _ in stream:
            seen.set()
        reasons.append(stream.finish_reason)

    reasons: list[str | None] = []
    worker = threading.Thread(target=work)
    worker.start()
    assert seen.wait(30)
    cancel.set()
    before = len(chosen)
    worker.join(30)
    assert reasons == ["cancelled"]
    assert len(chosen) - before <= 1, "the token under way"


@pytest.mark.parametrize("why", ["cancelled", "deadline"])
def test_a_long_prompt_is_interrupted_and_leaves_nothing_behind(rt: FusionRuntime, why: str) -> None:
    """The pass under way ends in the middle, and the cache answers afterwards as a fresh one does."""
    ids = np.random.default_rng(0).integers(3, 250, CHUNK).tolist()
    router, event = rt.backend.router.cache(), threading.Event()
    event.set()
    cancellation = Cancellation(event) if why == "cancelled" else Cancellation(deadline=0)
    interrupted = 0
    for _ in range(50):  # on a busy machine a pass may be over before the other thread runs
        try:
            with cancellation.interrupting(router.interrupt):
                router.forward(ids, (CHUNK - 1,))
        except Interrupted:
            interrupted += 1
            assert router.length == 0
        router.length = 0
        if interrupted == 3:
            break
    assert interrupted == 3 and cancellation.reason == why
    expected = np.array(rt.backend.router.cache().forward(ids, (CHUNK - 1,)).logits)
    assert np.array_equal(router.forward(ids, (CHUNK - 1,)).logits, expected)


def test_a_stream_that_is_cancelled_in_its_prompt_says_so(rt: FusionRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(1).integers(3, 250, 300).tolist()
    whole, cancel, forward = rt.generate(ids, 4), threading.Event(), OrtCache.forward

    def cancelled(cache: OrtCache, ids: Any, positions: Any) -> Any:
        cancel.set()
        raise Interrupted  # what ONNX Runtime's end of a run becomes

    with monkeypatch.context() as patch:
        patch.setattr(OrtCache, "forward", cancelled)
        result = rt.generate(ids, 4, cancel=cancel)
    assert OrtCache.forward is forward
    assert result.finish_reason == "cancelled" and not result.token_ids
    assert rt.generate(ids, 4) == whole


def test_logits_are_handed_over_without_a_copy_and_stay(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], precision="fp32") as rt:
        session = rt.session()
        with pytest.raises(InputError, match="There are no logits: call `step` first"):
            _ = session.logits
        ids = rt.encode(PROMPT)
        session.append(ids)
        rows, tokens = [], []
        for _ in range(5):
            tokens.append(session.step())
            rows.append(session.logits)
            assert np.shares_memory(session.logits, rows[-1]), "asked twice, the same memory"
        assert session._decoder.step.newest is not None and np.shares_memory(rows[-1], session._decoder.step.newest.rows), "not a copy"
        assert not any(np.shares_memory(first, second) for first in rows for second in rows if first is not second)
        session.step()
        expected = rt.score([*ids, *(token.id for token in tokens)])
        session.rewind(3)
        with pytest.raises(InputError, match="no logits"):
            _ = session.logits
    del session, rt
    gc.collect()
    for number, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        assert np.allclose(row, expected.logits[len(ids) - 1 + number], atol=1e-4) and row.argmax() == token.id
        assert row.data.format == "f" and row.data.shape == (len(row),)
        assert np.shares_memory(np.from_dlpack(row), row) and np.shares_memory(np.from_dlpack(token.routing), token.routing)


def test_routing_is_a_buffer_even_where_no_router_ran(rt: FusionRuntime) -> None:
    first, second = rt.stream(PROMPT, 2, expert=rt.expert_names[0], lam=0.0)
    assert np.isnan(np.from_dlpack(first.routing)).all() and not np.shares_memory(first.routing, second.routing)


FORK = """
import gc, os, sys
from fusionroute import FusionError, FusionRuntime
rt = FusionRuntime.load(sys.argv[1])
session = rt.session()
session.append([3, 4])
session.step()
stream = rt.stream("a", 30)
next(stream)
uses = (
    session.step, lambda: rt.generate("a", 3), rt.session, lambda: rt.score([3]), lambda: session.rewind(1), lambda: session.append([3]),
    session.clear, lambda: session.steps(2), lambda: list(stream),
)
read, write = os.pipe()
child = os.fork()
if not child:
    said = []
    for use in uses:
        try:
            use()
        except FusionError as error:
            said.append(str(error))
    with FusionRuntime.load(sys.argv[1]) as fresh:
        said.append(str(fresh.generate("12+30=", 4).token_ids))
    rt.close()
    stream.close()
    del rt, session, stream, uses, use
    gc.collect()
    os.write(write, "|".join(said).encode())
    os._exit(0)
os.close(write)
print(os.read(read, 1 << 16).decode(), end="|")
assert os.waitpid(child, 0)[1] == 0
print(rt.generate("12+30=", 4).token_ids)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused_and_may_load_again(bundles: list[Path]) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, str(bundles[0])], capture_output=True, text=True, check=True, timeout=120)
    *refused, fresh, parent = done.stdout.strip().split("|")
    assert len(refused) == 9 and {*refused} == {
        "The runtime was loaded before this process was forked and its threads stayed behind: load the bundle here."
    }
    assert fresh == parent


FORK_UNDER_PASSES = """
import os, signal, sys, threading
from fusionroute import ClosedError, FusionRuntime
from fusionroute.runtime.backends.ort_cpu import OrtCache

rt = FusionRuntime.load(sys.argv[1], catch_up="background", threads=1)
session = rt.session()
session.append([5 + each % 200 for each in range(300)])
inside, leave, forward = threading.Event(), threading.Event(), OrtCache.forward

def held(cache, ids, positions):
    if threading.current_thread() is not threading.main_thread():
        inside.set()
        leave.wait()
    return forward(cache, ids, positions)

OrtCache.forward = held
session.step()
inside.wait()  # an expert is in a background pass
child = os.fork()
if not child:
    signal.alarm(20)  # ends a child that waits for the pass
    refused = 0
    for use in (lambda: session.rewind(1), lambda: session.rewind(0), session.clear, lambda: session.append([5]), session.step):
        try:
            use()
        except ClosedError:
            refused += 1
    os._exit(refused)
leave.set()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
session.rewind(1)
print(len(session))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_during_a_background_pass_waits_for_nothing(bundles: list[Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK_UNDER_PASSES, str(bundles[0])], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["5", "1"]


FORK_UNDER_LOCK = """
import os, signal, sys, threading
from fusionroute import ClosedError, FusionRuntime
rt = FusionRuntime.load(sys.argv[1])
held, leave = threading.Event(), threading.Event()

def hold():
    with rt._sets._lock, rt._sets.current.system.prefixes[None]._lock:
        held.set()
        leave.wait()

holder = threading.Thread(target=hold)
holder.start()
held.wait()
child = os.fork()
if not child:
    signal.alarm(20)  # ends a child that waits for the lock
    refused = 0
    for use in (rt.session, rt._sets.current.decoder, lambda: rt.add_expert("a"), lambda: rt.remove_expert("a"), lambda: rt.generate("a", 3), lambda: rt.score([3])):
        try:
            use()
        except ClosedError:
            refused += 1
    os._exit(refused)
leave.set()
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused_before_it_waits_for_a_lock(bundles: list[Path]) -> None:
    """The lock was held by a thread of the parent, so that nobody in the child ever releases it."""
    done = subprocess.run([sys.executable, "-c", FORK_UNDER_LOCK, str(bundles[0])], capture_output=True, text=True, check=True, timeout=120)
    assert os.waitstatus_to_exitcode(int(done.stdout)) == 6


QUIET = """
import logging, os, signal, sys, threading
before = {number: signal.getsignal(number) for number in signal.valid_signals()}
from fusionroute import FusionRuntime
with FusionRuntime.load(sys.argv[1]) as rt:
    rt.generate("12+30=", 4)
    try:
        rt.generate("a", deadline="soon")
    except ValueError:
        pass
assert before == {number: signal.getsignal(number) for number in signal.valid_signals()}
assert not logging.getLogger("fusionroute").handlers and not logging.getLogger().handlers
"""


def test_nothing_is_printed_and_signals_and_handlers_are_left_alone(bundles: list[Path]) -> None:
    done = subprocess.run([sys.executable, "-c", QUIET, str(bundles[0])], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_types_of_options_are_those_of_the_options() -> None:
    assert set(SamplingOptions.__annotations__) == {field.name for field in fields(Sampling)}
    code = FusionRuntime.stream.__code__
    keywords = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    assert set(RuleOptions.__annotations__) == {field.name for field in fields(TextRules)}
    assert set(StreamOptions.__annotations__) - set(TextOptions.__annotations__) == set(keywords)
    assert (Path(sys.modules["fusionroute.runtime"].__file__ or "").parent / "py.typed").exists()


def test_a_cache_takes_the_memory_of_its_text() -> None:
    """32 MB of room in 16 heads, of which 64 tokens write 256 KB: far less than the 2 MB of a huge page each."""
    buffers = zeros((4, 1, 4, 8192, 64))
    before = resident().anonymous
    buffers[..., :16, :] = 1.0
    assert resident().anonymous - before < 4 << 20
    assert float(buffers.sum()) == 4 * 4 * 16 * 64
