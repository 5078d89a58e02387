"""Requests go where their beginning was read."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.runtime.serve.prefix_affinity import LEAST_SHARED, LONGEST, PrefixAffinity, prompt_text

LONG = "The sea is wide. " * 10


def test_the_replica_that_read_the_longest_beginning_comes_first() -> None:
    affinity = PrefixAffinity(texts=2, slack=1)
    affinity.note("a", LONG + "Why?")
    affinity.note("b", LONG + "Where is it?")
    assert affinity.order(LONG + "Where are they?", {"a": 0, "b": 1}) == ["b", "a"]
    assert affinity.order(LONG + "Why not?", {"a": 1, "b": 0}) == ["a", "b"]


def test_one_that_is_too_busy_comes_by_its_load() -> None:
    affinity = PrefixAffinity(texts=2, slack=1)
    affinity.note("a", LONG)
    assert affinity.order(LONG, {"a": 1, "b": 0}) == ["a", "b"]
    assert affinity.order(LONG, {"a": 2, "b": 0}) == ["b", "a"]


def test_only_the_last_texts_and_those_of_living_replicas_are_remembered() -> None:
    affinity = PrefixAffinity(texts=1, slack=9)
    affinity.note("a", LONG)
    affinity.note("a", "x" * 200)
    assert affinity.order(LONG, {"a": 1, "b": 0}) == ["b", "a"]
    assert affinity.order("x" * 200, {"a": 1, "b": 0}) == ["a", "b"]
    affinity.forget("a")
    assert affinity.order("x" * 200, {"a": 1, "b": 0}) == ["b", "a"]


@pytest.mark.parametrize(("length", "first"), [(LEAST_SHARED - 1, "b"), (LEAST_SHARED, "a")])
def test_what_is_short_is_read_again(length: int, first: str) -> None:
    affinity = PrefixAffinity(texts=1, slack=9)
    affinity.note("a", "x" * length + "-" * 200)
    assert affinity.order("x" * length + "+", {"a": 1, "b": 0})[0] == first


TEXTS = st.lists(st.sampled_from("xy"), max_size=4).map("".join)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), TEXTS), max_size=8),
    TEXTS,
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 5)),
)
def test_the_order_is_that_of_what_is_left_to_read(read: list[tuple[str, str]], asked: str, loads: dict[str, int]) -> None:
    """Every letter stands for 100 characters, and nothing is too busy."""
    affinity = PrefixAffinity(texts=9, slack=9)
    for replica, text in read:
        affinity.note(replica, "".join(letter * 100 for letter in text))
    order = affinity.order("".join(letter * 100 for letter in asked), loads)

    def left(replica: str) -> int:
        texts = [text for each, text in read if each == replica]
        return min(
            (next((len(asked) - n for n in range(len(asked), -1, -1) if text.startswith(asked[:n]))) for text in texts), default=len(asked)
        )

    assert sorted(order) == sorted(loads)
    assert [(left(replica), loads[replica]) for replica in order] == sorted((left(replica), loads[replica]) for replica in loads)


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_prompts_that_begin_alike_are_texts_that_begin_alike() -> None:
    first: list[dict[str, str]] = [{"role": "user", "content": LONG}]
    answered = [*first, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    assert prompt_text(body(messages=answered)).startswith(prompt_text(body(messages=first))[:-2])
    assert not prompt_text(body(messages=answered, tools=[{"type": "function"}])).startswith("[null")
    assert prompt_text(body(prompt=[1, 2, 3, 4])).startswith(prompt_text(body(prompt=[1, 2]))[:-1])
    assert prompt_text(body(prompt=LONG)) == LONG and len(prompt_text(body(prompt="x" * 2 * LONGEST))) == LONGEST


@pytest.mark.parametrize("wrong", [b"", b"{", b"[]", b"7", b"{}", b'"prompt"', b"[" * 100_000, b"\xff"])
def test_what_is_no_request_has_no_text(wrong: bytes) -> None:
    assert prompt_text(wrong) == ""
