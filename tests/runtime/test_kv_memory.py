"""One bound for all texts: what they take is what their buffers hold, idle ones make room, and what does not fit is told."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import FusionRuntime, InputError, UnavailableError
from fusionroute.runtime.kv_memory import KvMemory
from fusionroute.runtime.limits import PIECE

PROMPT = [5 + number % 80 for number in range(200)]
TOKEN = 512  # bytes of a token in each model: 2 · 1 layer · 2 heads · 32 values · 4 bytes


def load(bundle: Path, tokens: int | None, **options: Any) -> FusionRuntime:
    """A runtime whose models have room for so many tokens together."""
    limit = None if tokens is None else tokens * TOKEN
    return FusionRuntime.load(bundle, "fp32", "cpu", threads=1, kv_memory=limit, **options)


def taken(rt: FusionRuntime) -> int:
    """Tokens that have room."""
    tokens, rest = divmod(rt._sets.current.system.kv_memory.taken, TOKEN)
    assert not rest
    return tokens


def room(length: int) -> int:
    """That a model's cache takes for a text: by PIECE, with two tokens to spare."""
    return -(-(length + 2) // PIECE) * PIECE


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Memory comes back when the last reference goes, not when the collector looks for circles."""
    gc.disable()
    yield
    gc.enable()


def test_what_is_taken_is_what_models_have_read(bundles: list[Path], no_collector: None) -> None:
    with load(bundles[0], None) as rt:
        session = rt.session(expert="expert0")
        assert taken(rt) == 0
        session.append(PROMPT)
        assert taken(rt) == 0, "nothing runs yet"
        session.step()
        assert taken(rt) == 2 * room(200), "router and expert"
        session.append([7] * 100)
        session.read()
        assert taken(rt) == 2 * room(298) + room(298)
        session.rewind(10)
        session.step()
        assert taken(rt) == 3 * room(298), "what was written stays mapped"
        del session
        assert taken(rt) == 0
        rt.generate(PROMPT, 2)
        assert 0 < taken(rt) <= 3 * room(202), "kept for prompts that begin alike"


def test_the_oldest_idle_text_makes_room(bundles: list[Path], no_collector: None) -> None:
    with load(bundles[0], 5 * room(100), prefix_cache=4) as rt:
        prompts = [[first, *PROMPT[:97]] for first in (90, 91, 92)]
        for prompt in prompts[:2]:
            rt.generate(prompt, 1, expert="expert0")
        pool = rt._sets.current.pool
        assert taken(rt) == 4 * room(100) and [decoder.sequence.ids[0] for decoder in pool.idle] == [90, 91]
        rt.generate(prompts[2], 1, expert="expert0")
        assert taken(rt) == 4 * room(100) and [decoder.sequence.ids[0] for decoder in pool.idle] == [91, 92]


def test_a_text_that_does_not_fit_is_told_before_it_is_read(bundles: list[Path], router_reads: list[int], no_collector: None) -> None:
    with load(bundles[0], 3 * room(100)) as rt, load(bundles[0], None) as anew:
        session, other = rt.session(expert="expert0"), rt.session(expert="expert0")
        session.append(PROMPT[:90])
        first = session.step()
        other.append(PROMPT)
        for _ in range(2):
            with pytest.raises(UnavailableError) as caught:
                other.step()
            assert str(caught.value) == (
                "0.1 MB of keys and values are needed and 0.1 MB are free of the 0.2 MB of kv_memory: end other texts, shorten this "
                "one, or allow more."
            )
        assert router_reads == [90] and other.token_ids == PROMPT and taken(rt) == 2 * room(90)
        while len(session) < 125:
            session.step()
        with pytest.raises(UnavailableError, match="of kv_memory: end other texts"):
            while True:
                session.step()
        assert len(session) == room(190) - 1, "two tokens to spare, and the newest one is not read"
        expected = anew.session(expert="expert0")
        expected.append(PROMPT[:90])
        expected.step()
        while len(expected) < len(session):
            expected.step()
        assert session.token_ids == expected.token_ids and session.token_ids[90] == first.id
        session.rewind(100)
        session.step()
        del other
        session.close()
        rt.generate(PROMPT[:100], 4, expert="expert0")


@pytest.mark.parametrize("number", [0, 2], ids=["models", "one base"])
def test_of_a_long_prompt_that_does_not_fit_nothing_is_read(bundles: list[Path], number: int) -> None:
    """Though its first passes would fit; the router, which would, reads no pass that it shares with an expert."""
    each = 1 + number // 2  # the system with one base has two layers
    with load(bundles[number], each * room(400)) as rt:
        session = rt.session(expert="expert0")
        session.append(PROMPT * 3)
        with pytest.raises(UnavailableError, match="of kv_memory"):
            session.step()
        assert session._decoder.readers.router.length == 0 and session.lags["expert0"] == 600
    with load(bundles[number], each * room(600)) as rt:
        session = rt.session(expert="expert0")
        session.append(PROMPT * 3)
        with pytest.raises(UnavailableError, match="of kv_memory"):
            session.step()
        assert session._decoder.readers.router.length == (0 if number else 600) and session.lags["expert0"] == 600


def test_streams_end_with_the_tokens_so_far(bundles: list[Path]) -> None:
    with load(bundles[0], 2 * room(60)) as rt:
        tokens: list[int] = []
        with pytest.raises(UnavailableError, match="of kv_memory"):
            rt.generate(PROMPT[:60], 30, expert="expert0", on_token=lambda token: tokens.append(token.id))
        assert len(tokens) == 3
        assert rt.generate(PROMPT[:50], 4, expert="expert0").finish_reason == "length", "its buffers serve the next text"
        with pytest.raises(UnavailableError, match="of kv_memory"):
            rt.score(PROMPT)


def test_an_expert_without_room_does_not_read_in_the_background(bundles: list[Path]) -> None:
    with load(bundles[0], 2 * room(200), catch_up="background") as rt:
        session = rt.session(expert="expert0")
        session.append(PROMPT)
        for _ in range(5):
            session.step()
        session._decoder.readers.settle()
        assert session.lags["expert1"] == 205 and taken(rt) == 2 * room(200)


@pytest.mark.parametrize("number", [0, 2], ids=["models", "one base"])
def test_a_saved_text_must_fit(bundles: list[Path], number: int, tmp_path: Path, no_collector: None) -> None:
    each = 1 + number // 2  # the system with one base has two layers
    with load(bundles[number], None) as rt:
        session = rt.session()
        session.append(PROMPT)
        session.read([])
        session.save(tmp_path / "text")
    with load(bundles[number], each * room(150)) as rt:
        session = rt.session()
        with pytest.raises(UnavailableError, match="of kv_memory"):
            session.load(tmp_path / "text")
        assert len(session) == 0 and taken(rt) == 0
    with load(bundles[number], each * room(200)) as rt:
        rt.session().load(tmp_path / "text")


def test_drafts_end_as_steps_do(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.speculation import draft_always

    draft_always(monkeypatch)
    with load(bundles[0], 2 * room(60), speculation="auto") as rt, load(bundles[0], None) as plain:
        session, expected = rt.session(expert="expert0"), plain.session(expert="expert0")
        for each in (session, expected):
            each.append(PROMPT[:40])
        with pytest.raises(UnavailableError, match="of kv_memory"):
            while True:
                session.steps(8)
        assert len(session) > 50
        while len(expected) < len(session):
            expected.step()
        assert session.token_ids == expected.token_ids, "drafts without room are no tokens"


def test_a_router_does_not_answer_for_an_expert_without_room(bundles: list[Path]) -> None:
    with load(bundles[0], room(60), on_expert_failure="router_only") as rt:
        session = rt.session()
        session.append(PROMPT[:60])
        with pytest.raises(UnavailableError, match="of kv_memory"):
            session.step()


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "1 GB", True])
def test_what_is_no_number_of_bytes_is_refused(bundles: list[Path], wrong: Any) -> None:
    with pytest.raises(InputError, match=r"^kv_memory=.* is out of range: expected a number of bytes, or None for no limit\.$"):
        FusionRuntime.load(bundles[0], kv_memory=wrong)


class Cache:
    kv_bytes = 0


class Idle:
    """Texts of some sizes that are kept."""

    def __init__(self, memory: KvMemory, sizes: list[int]):
        self.caches = []
        for size in sizes:
            cache = Cache()
            memory.grow(cache, size)
            self.caches.append(cache)
            del cache

    def drop_oldest(self) -> bool:
        return bool(self.caches) and self.caches.pop(0) is not None


def test_no_more_texts_go_than_must() -> None:
    memory = KvMemory(100)
    idle = Idle(memory, [10, 20, 30])
    memory.give_back_from(idle)
    cache = Cache()
    memory.grow(cache, 40)
    assert memory.taken == 100 and len(idle.caches) == 3
    memory.grow(cache, 41)
    assert memory.taken == 91 and len(idle.caches) == 2
    memory.grow(cache, 71)
    assert memory.taken == 71 and not idle.caches
    with pytest.raises(UnavailableError):
        memory.grow(cache, 101)
    assert cache.kv_bytes == 71
    other = Cache()
    with pytest.raises(UnavailableError):
        memory.grow(other, 30)
    assert memory.taken == 71
