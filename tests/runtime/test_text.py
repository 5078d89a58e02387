"""The tokenizer, and streaming detokenisation: all pieces together are the decoded text."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusionroute.runtime.errors import BundleError, InputError
from fusionroute.runtime.text import Text, failed
from fusionroute.runtime.text_stream import TextStream
from tests.support.tokenizers import MAKERS, SAMPLE, byte_level, id_of, joined, one_byte, streamed, text_of, token


@pytest.mark.parametrize("kind", MAKERS)
def test_random_ids_stream_to_what_they_decode_to(kind: str) -> None:
    text = text_of(kind)
    size = text._tokenizer.get_vocab_size() + 3  # the last ones pad the vocabulary

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.integers(0, size - 1), max_size=40))
    def check(ids: list[int]) -> None:
        assert joined(streamed(text, ids)[0]) == text.decode(ids)

    check()


raw = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([char.encode() for char in "aé東😀\ufffd\u0301"]),
    st.sampled_from(
        [b"\xf0", b"\x9f\x98", b"\x80", b"\xe6\x9d", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90", b"<special>", b"<padding>"]
    ),
)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "byte fallback, strip"])
def test_any_bytes_stream_to_what_they_decode_to(kind: str) -> None:
    """Whole, broken and invalid characters, one byte a token, with other tokens among them."""
    text = text_of(kind)
    words = text.encode(" the fox", special=False)
    special = id_of(kind, "<eos>")

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.one_of(raw, st.none()), max_size=10))
    @example([b"\x80" * 9, None])
    @example(["😀".encode()[:3], b"<special>", b"\x80", b"\x80"])
    @example([b"\x20", b" a"])
    def check(parts: list[bytes | None]) -> None:
        ids: list[int] = []
        for part in parts:
            if part == b"<special>":
                ids.append(special)
            elif part == b"<padding>":
                ids.append(10_000)
            elif part is None:
                ids += words
            else:
                ids += [one_byte(kind, byte) for byte in part]
        assert joined(streamed(text, ids)[0]) == text.decode(ids)

    check()


@pytest.mark.parametrize("kind", MAKERS)
def test_real_text_streams_whole(kind: str) -> None:
    text = text_of(kind)
    for line in SAMPLE:
        ids = text.encode(line, special=False)
        tokens, _ = streamed(text, ids)
        assert joined(tokens) == text.decode(ids)
        if "\ufffd" not in text.decode(ids):
            assert not any("\ufffd" in each.text for each in tokens)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_a_character_belongs_to_the_token_that_completes_it(kind: str) -> None:
    stream = TextStream(text_of(kind))
    held = [one_byte(kind, byte) for byte in "😀é".encode()]
    out = [stream.push(token(id)) for id in held]
    if kind == "byte level":
        assert [[each.text for each in tokens] for tokens in out] == [[], [], [], ["", "", "", "😀"], [], ["", "é"]]
        assert stream.finish() == []
    else:  # one more byte could still make the whole run invalid
        assert out == [[]] * 6
        closing = id_of(kind, "a")
        assert [each.text for each in stream.push(token(closing))] == ["", "", "", "😀", "", "é", "a"]


def test_what_stays_unfinished_comes_at_the_end() -> None:
    stream = TextStream(text_of("byte level"))
    assert [stream.push(token(one_byte("byte level", byte))) for byte in b"\xf0\x9f"] == [[], []]
    assert [each.text for each in stream.finish()] == ["", "\ufffd"]
    assert stream.finish() == []


def test_endless_invalid_bytes_are_not_held_for_ever() -> None:
    stream = TextStream(text_of("byte level"))
    out = [len(stream.push(token(one_byte("byte level", 0x80)))) for _ in range(20)]
    assert out == [0, 0, 0] + [1] * 17
    # three held tokens: the one handed out last left its own to the next
    assert joined(stream.finish()) == "\ufffd" * 4


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_work_is_linear(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens decoded and characters searched for 4,000 invalid bytes, against those for 1,000."""
    work = 0
    decode, search = Text.decode, TextStream._search

    def counted_decode(text: Text, ids: Sequence[int], **options: Any) -> str:
        nonlocal work
        work += len(ids)
        return decode(text, ids, **options)

    def counted_search(stream: TextStream, spelled: list[str], end: int) -> tuple[int, int]:
        nonlocal work
        work += len(spelled) + end
        return search(stream, spelled, end)

    monkeypatch.setattr(Text, "decode", counted_decode)
    monkeypatch.setattr(TextStream, "_search", counted_search)
    counts = []
    for count in (1_000, 4_000):
        work = 0
        streamed(text_of(kind), [one_byte(kind, 0x80)] * count, ["never met", "\ufffd!"])
        counts.append(work)
    assert counts[1] < 4.1 * counts[0]


def test_without_a_tokenizer_tokens_pass_without_text() -> None:
    stream = TextStream(None)
    passed = stream.push(token(5))
    assert [(each.id, each.text) for each in passed] == [(5, "")]
    assert stream.finish() == []
    assert not stream.stopped


def test_encode_and_decode_are_the_tokenizers(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Text.load(tmp_path / "tokenizer.json")
    ids = text.encode("Grüße, 😀")
    assert ids[0] == 0 and len(ids) > 5  # BOS, and neither cut nor padded
    assert text.encode("Grüße, 😀", special=False) == ids[1:]
    assert text.encode("<bos>Grüße, 😀", special=False) == ids
    assert text.decode(ids) == "Grüße, 😀"
    assert text.decode(ids, skip_special_tokens=False) == "<bos>Grüße, 😀"
    assert text.decode(np.array(ids)) == "Grüße, 😀"  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "space"), [("byte level", ""), ("byte fallback", ""), ("byte fallback, strip", " "), ("metaspace", " ")])
def test_pieces_are_what_tokens_add(kind: str, space: str) -> None:
    """Spaces included, and special tokens as they are spelled. Some vocabularies write a space before the first word."""
    text, sample = text_of(kind), SAMPLE[0]
    pieces = [text.piece(id) for id in text.encode(space + sample, special=False)]
    assert "".join(pieces) in (space + sample, " " + sample) and len(pieces) > 5
    assert text.piece(id_of(kind, "<bos>")) == "<bos>"


def test_panics_are_errors_of_a_text_and_other_ends_are_not() -> None:
    panic = type("".join(("Panic", "Exception")), (BaseException,), {})
    for error in (panic("index 5"), ValueError("index 5")):
        assert str(failed(error)) == "The tokenizer fails on this text (index 5); export the bundle again."
    for end in (KeyboardInterrupt(), SystemExit()):
        with pytest.raises(type(end)):
            failed(end)


def test_bad_input_is_said_in_one_sentence(tmp_path: Path) -> None:
    text = text_of("byte level")
    for wrong in ("\ud800", 7, None):
        with pytest.raises(InputError, match="Unicode"):
            text.encode(wrong)  # type: ignore[arg-type]
    for ids in ([-1], [2**40], ["a"]):
        with pytest.raises(InputError, match="token ids"):
            text.decode(ids)  # type: ignore[arg-type]
    (tmp_path / "tokenizer.json").write_text("{")
    for path in (tmp_path / "tokenizer.json", tmp_path / "missing.json"):
        with pytest.raises(BundleError, match=path.name):
            Text.load(path)


def test_importing_is_light() -> None:
    modules = ", ".join(f"fusionroute.runtime.{name}" for name in ("text", "chat", "sampling"))
    code = f"import sys, {modules}; print({{'tokenizers', 'jinja2', 'torch'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
