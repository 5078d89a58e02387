"""The prefix cache: what was read of a prompt is not read again, and nothing else changes."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backends.ort_cpu import OrtCache
from fusionroute.runtime.prefix import PrefixCache

SYSTEM = list(range(5, 65))


@pytest.fixture(scope="module", params=["int8", "fp32"])
def runtimes(request: pytest.FixtureRequest, bundles: list[Path]) -> Iterator[tuple[FusionRuntime, FusionRuntime]]:
    """One that keeps prefixes, and one that does not."""
    with FusionRuntime.load(bundles[0], request.param) as sharing, FusionRuntime.load(bundles[0], request.param, prefix_cache=0) as anew:
        yield sharing, anew


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Tokens that each model has read since."""
    counts: dict[str, int] = {}
    forward = OrtCache.forward

    def noted(cache: OrtCache, ids: Any, positions: Any) -> Any:
        counts[cache._model.model.name] = counts.get(cache._model.model.name, 0) + len(ids)
        return forward(cache, ids, positions)

    monkeypatch.setattr(OrtCache, "forward", noted)
    return counts


def test_a_prompt_that_begins_alike_is_read_from_where_it_parts(
    runtimes: tuple[FusionRuntime, FusionRuntime], read: dict[str, int]
) -> None:
    sharing, anew = runtimes
    sharing.generate([*SYSTEM, 70, 71, 72], 4)
    for rt, expected in ((sharing, 3), (anew, 63)):
        read.clear()
        rt.generate([*SYSTEM, 80, 81, 82], 1)
        assert read["router"] == expected
    read.clear()
    sharing.generate([*SYSTEM, 80, 81, 82], 1)
    assert read["router"] == 3, "the newest token is never read alone, and an even number is lent"


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_tokens_do_not_depend_on_what_is_kept(runtimes: tuple[FusionRuntime, FusionRuntime], data: st.DataObject) -> None:
    sharing = runtimes[0]
    shared = data.draw(st.lists(st.integers(5, 90), min_size=1, max_size=80))
    for _ in range(3):
        ids = shared[: data.draw(st.integers(1, len(shared)))] + data.draw(st.lists(st.integers(5, 90), max_size=5))
        results = [rt.generate(ids, 8) for rt in runtimes]
        assert results[0].token_ids == results[1].token_ids
        assert results[0].experts == results[1].experts
        tolerance = 0.0 if sharing.precision == "int8" else 1e-4
        np.testing.assert_allclose(results[0].logprobs, results[1].logprobs, atol=tolerance, rtol=0)
        shared = ids + results[0].token_ids  # the next turn of a chat


def test_sessions_share_while_they_live(runtimes: tuple[FusionRuntime, FusionRuntime], read: dict[str, int]) -> None:
    sharing, anew = runtimes
    prompt = [91, *SYSTEM]
    first, second = sharing.session(), sharing.session()
    first.append(prompt)
    lead = first.step()
    read.clear()
    second.append([*prompt, 70, 71])
    token = second.step()
    assert read["router"] == 3 and read[token.expert] == (3 if token.expert == lead.expert else len(prompt) + 2)
    fresh = anew.session()
    fresh.append([*prompt, 70, 71])
    assert [token.id, *(second.step().id for _ in range(5))] == [fresh.step().id for _ in range(6)]


def test_what_was_forgotten_is_not_lent(runtimes: tuple[FusionRuntime, FusionRuntime]) -> None:
    sharing, anew = runtimes
    prompt = [92, *SYSTEM]
    lender, borrower, fresh = sharing.session(), sharing.session(), anew.session()
    lender.append(prompt)
    lender.step()
    lender.rewind(20)
    lender.append([77] * 60)  # other tokens where those of the prompt were
    lender.step()
    for session in (borrower, fresh):
        session.append(prompt)
    assert [borrower.step().id for _ in range(6)] == [fresh.step().id for _ in range(6)]


def test_what_was_read_token_by_token_is_not_lent(runtimes: tuple[FusionRuntime, FusionRuntime], read: dict[str, int]) -> None:
    """Rounding differs there, so that text would depend on what is cached."""
    sharing, _ = runtimes
    lender, borrower = sharing.session(), sharing.session()
    lender.append([94, *SYSTEM])
    lender.step()
    lender.rewind(20)
    for _ in range(45):
        lender.step()
    borrower.append(lender.token_ids[:60])
    read.clear()
    borrower.step()
    assert read["router"] == 60 - 18, "of 19 an even number"


def test_lenders_may_go_on_and_forget_meanwhile(runtimes: tuple[FusionRuntime, FusionRuntime]) -> None:
    sharing, anew = runtimes
    prompts = [[93, *SYSTEM, 5 + number] for number in range(4)]
    expected = [anew.generate(ids, 6).token_ids for ids in prompts]
    wrong: list[str] = []

    def work(number: int) -> None:
        session = sharing.session()
        for turn in range(15):
            session.append(prompts[number])
            tokens = [session.step().id for _ in range(6)]
            if tokens != expected[number]:
                wrong.append(f"thread {number}, text {turn}: {tokens}")
            session.rewind(0 if turn % 2 else 30)
            session.rewind(0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Reader:
    """A model's reader that has read so many of any tokens."""

    def __init__(self, length: int):
        self.length = length

    def offer(self, ids: Sequence[int]) -> int:
        return self.length

    def lend(self, ids: Sequence[int], cache: Any) -> None:
        cache.append(self.length)


@pytest.mark.parametrize(("lengths", "lent"), [([], []), ([15], []), ([16], [16]), ([17], [17]), ([0, 40, 20], [40]), ([64, 16], [64])])
def test_the_longest_beginning_is_lent_from_16_tokens_on(lengths: list[int], lent: list[int]) -> None:
    """Once, and by another than the borrower, which has read nothing yet; by nobody after all was forgotten."""
    copied: list[int] = []
    cache, readers, borrower = PrefixCache(), [Reader(length) for length in lengths], Reader(99)
    for reader in (*readers, borrower):
        cache.borrow(reader, [], [])  # type: ignore[arg-type]
    cache.borrow(borrower, [], copied)  # type: ignore[arg-type]
    assert copied == lent
    cache.borrow(Reader(0), [], copied)  # type: ignore[arg-type]
    assert copied == [*lent, 99], "the borrower lends too"
    cache.forget()
    cache.borrow(Reader(0), [], copied)  # type: ignore[arg-type]
    assert copied == [*lent, 99]
