"""Texts that cannot fit are refused by their length, and those that may are encoded beside other threads, until a deadline."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import FusionRuntime, InputError
from fusionroute.runtime.prompt import SHORT
from fusionroute.runtime.text import Text

Encode = Callable[..., list[int]]


@pytest.fixture(scope="module")
def rt(bundles: list[Path]) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(bundles[0], "fp32", "cpu", threads=1) as runtime:
        yield runtime


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> Callable[[Encode], None]:
    """Encode all texts in another way."""
    return lambda encode: monkeypatch.setattr(Text, "encode", encode)


def most(rt: FusionRuntime) -> int:
    tokenizer = rt.tokenizer
    assert tokenizer is not None
    return rt.max_seq_len * max(len(tokenizer.decode([id], skip_special_tokens=False)) for id in range(rt.vocab_size))


def test_a_text_that_cannot_fit_is_not_encoded(rt: FusionRuntime, encoding: Callable[[Encode], None]) -> None:
    longest = rt.tokenizer.longest  # type: ignore[union-attr]
    limit = rt.max_seq_len * longest
    assert limit > SHORT
    texts: list[int] = []

    def encode(self: Text, text: str, **_: Any) -> list[int]:
        texts.append(len(text))
        return [5]

    encoding(encode)
    assert rt.generate("x" * limit, 1).token_ids and texts == [limit]
    for prompt in ("x" * (limit + 1), [{"role": "user", "content": "x" * (limit + 1)}]):
        with pytest.raises(InputError) as caught:
            rt.generate(prompt, 1, deadline=0.0)
        assert str(caught.value).endswith(
            f" characters, and a context of {rt.max_seq_len} tokens holds at most {limit}: shorten it or export with a larger --max-seq-len."
        )
    assert texts == [limit]


def test_no_token_has_more_characters_than_the_longest(rt: FusionRuntime) -> None:
    assert most(rt) <= rt.max_seq_len * rt.tokenizer.longest  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
def test_encoding_is_left_behind_when_the_text_is_to_end(rt: FusionRuntime, encoding: Callable[[Encode], None], how: str) -> None:
    begun, go_on, cancel = threading.Event(), threading.Event(), threading.Event()

    def encode(self: Text, text: str, **_: Any) -> list[int]:
        begun.set()
        go_on.wait(60)
        return [5]

    encoding(encode)
    if how == "cancelled":
        threading.Thread(target=lambda: cancel.set() if begun.wait(60) else None).start()
    options: dict[str, Any] = {"cancel": cancel} if how == "cancelled" else {"deadline": 0.05}
    try:
        result = rt.generate("x" * (SHORT + 1), 4, **options)
    finally:
        go_on.set()
    assert (result.token_ids, result.text, result.finish_reason) == ([], "", how)


def test_what_encoding_raises_comes_out_of_its_thread(rt: FusionRuntime) -> None:
    for options in ({}, {"deadline": 60}):
        with pytest.raises(InputError, match="not a str of valid Unicode characters"):
            rt.generate("\udc80" * (SHORT + 1), 1, **options)  # type: ignore[arg-type]


def test_long_texts_have_the_ids_of_any_text(rt: FusionRuntime) -> None:
    text = "12+30= and more, " * 150
    ids = rt.encode(text)
    assert len(text) <= SHORT and rt.prompt_ids(text) == ids
    assert rt.prompt_ids(text * 2) == rt.encode(text * 2)
