"""Why a text ends, and that a closed runtime says so."""

import threading
from pathlib import Path

import pytest

from fusionroute.runtime import ClosedError, FusionError, FusionRuntime
from tests.support.bundles import copy_with_ends

PROMPT = "12+30= and more"


def test_why_a_text_ends(rt: FusionRuntime) -> None:
    long = rt.generate(PROMPT, max_new_tokens=10)
    assert long.finish_reason == "length" and len(long.token_ids) == 10
    stop = long.text[3:5]
    stopped = rt.generate(PROMPT, max_new_tokens=10, stop=stop)
    assert stopped.finish_reason == "stop" and stopped.text == long.text[: long.text.index(stop)]
    event = threading.Event()
    stream = rt.stream(PROMPT, max_new_tokens=10, cancel=event)
    next(stream)
    event.set()
    assert len(list(stream)) <= 1 and stream.finish_reason == "cancelled"
    closed = rt.stream(PROMPT, max_new_tokens=10, stop=None)
    next(closed)
    closed.close()
    assert closed.finish_reason == "cancelled" and not list(closed)
    full = rt.generate([5] * (rt.max_seq_len - 3), max_new_tokens=10)
    assert full.finish_reason == "length" and len(full.token_ids) <= 3


def test_the_end_of_sequence_token_ends_and_is_left_out(bundles: list[Path], tmp_path: Path) -> None:
    with FusionRuntime.load(bundles[0]) as rt:
        long = rt.generate(PROMPT, max_new_tokens=10)
    end = long.token_ids[4]
    with FusionRuntime.load(copy_with_ends(bundles[0], tmp_path / "bundle", [end])) as rt:
        for _ in range(2):  # by a new decoder and by one that the first text used
            ended = rt.generate(PROMPT, max_new_tokens=10)
            assert ended.finish_reason == "stop"
            assert ended.token_ids == long.token_ids[: long.token_ids.index(end)]


def test_a_closed_runtime_says_so(bundles: list[Path]) -> None:
    rt = FusionRuntime.load(bundles[0])
    session, stream = rt.session(), rt.stream(PROMPT, 10)
    session.append([3, 4])
    next(stream)
    rt.close()
    rt.close()
    for use in (session.step, rt.session, lambda: next(stream), lambda: rt.generate(PROMPT), lambda: rt.score([3])):
        with pytest.raises(ClosedError, match="closed"):
            use()
    assert issubclass(ClosedError, FusionError)
