"""Streaming detokenisation: all pieces together are the decoded text, cut before the first stop string."""

import functools
import json
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
from fusionroute.runtime.text import Text, TextStream, Token

tokenizers: Any = pytest.importorskip("tokenizers")

SAMPLE = [
    "The quick brown fox jumps over the lazy dog, and then it jumps again. 12+30=42",
    "Übermäßig schöne Grüße aus Köln; garçon, déjà vu, cafe\u0301 a\u0308",
    "東京は日本の首都です。我喜欢学习语言。 서울은 대한민국의 수도입니다.",
    "Привет, мир! नमस्ते दुनिया שלום עולם مرحبا بالعالم",
    "Emoji: 😀😃 👩‍🚀 🏳️‍🌈 🇩🇪 👍🏽 — ½ ∑ \ufffd",
    "def add(a, b):\n\treturn a + b\n\n",
]


def byte_level() -> Any:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<bos>", "<eos>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    tokenizer.add_tokens(["<plain>", "ünï"])  # added, yet not special: decoded as they stand
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return tokenizer


def byte_fallback(strip: bool) -> Any:
    """As Gemma-2 decodes; with `strip` as Llama-2 does."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.train_from_iterator(
        [SAMPLE[0], SAMPLE[1]],
        tokenizers.trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))],
            initial_alphabet=["\ufffd", "▁"],
            show_progress=False,
        ),
    )
    # The trainer reserves special tokens only, and a byte is none.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [added for added in state["added_tokens"] if not added["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def metaspace() -> Any:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.train_from_iterator(
        SAMPLE, tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<bos>"], initial_alphabet=["▁"], show_progress=False)
    )
    return tokenizer


def word_piece() -> Any:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


MAKERS = {
    "byte level": byte_level,
    "byte fallback": lambda: byte_fallback(strip=False),
    "byte fallback, strip": lambda: byte_fallback(strip=True),
    "metaspace": metaspace,
    "word piece": word_piece,
}


@functools.cache
def text_of(kind: str) -> Text:
    return Text(MAKERS[kind]())


def token(id: int) -> Token:
    return Token(id, "math", -0.5, np.zeros(2, np.float32))


def streamed(text: Text, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[Token], bool]:
    """All tokens that came out, in the order they went in, and whether a stop string was met."""
    stream = TextStream(text, stop)
    tokens: list[Token] = []
    for id in ids:
        tokens += stream.push(token(id))
        if stream.stopped:
            break
    tokens += stream.finish()
    assert [each.id for each in tokens] == list(ids)[: len(tokens)]
    assert stream.stopped or len(tokens) == len(ids)
    return tokens, stream.stopped


def joined(tokens: Sequence[Token]) -> str:
    return "".join(each.text for each in tokens)


def id_of(kind: str, string: str) -> int:
    id = text_of(kind)._tokenizer.token_to_id(string)
    assert id is not None
    return id


def one_byte(kind: str, byte: int) -> int:
    """The id of a token for a single byte."""
    if kind != "byte level":
        return id_of(kind, f"<0x{byte:02X}>")
    # GPT-2's table: printable bytes stand for themselves, the others follow from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [value for value in range(256) if value not in printable]
    return id_of(kind, chr(byte) if byte in printable else chr(256 + rest.index(byte)))


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

    def counted_search(stream: TextStream, text: str) -> tuple[int, int]:
        nonlocal work
        work += len(text)
        return search(stream, text)

    monkeypatch.setattr(Text, "decode", counted_decode)
    monkeypatch.setattr(TextStream, "_search", counted_search)
    counts = []
    for count in (1_000, 4_000):
        work = 0
        streamed(text_of(kind), [one_byte(kind, 0x80)] * count, ["never met", "\ufffd!"])
        counts.append(work)
    assert counts[1] < 4.1 * counts[0]


# Stop strings


def reference(full: str, stop: Sequence[str]) -> str:
    met = [place for string in stop if (place := full.find(string)) >= 0]
    return full[: min(met)] if met else full


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "word piece"])
def test_stop_strings_cut_the_text_as_if_it_were_whole(kind: str) -> None:
    text = text_of(kind)
    alphabet = [text.encode(word, special=False) for word in ("a", "b", " the", "ab", "é", "😀", "aab", ".")]
    size = text._tokenizer.get_vocab_size()

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(st.one_of(st.sampled_from(alphabet), st.integers(0, size - 1).map(lambda id: [id])), max_size=25),
        st.lists(st.text("ab. ethé😀\ufffd", min_size=1, max_size=5), max_size=3),
    )
    def check(words: list[list[int]], stop: list[str]) -> None:
        ids = [id for word in words for id in word]
        tokens, stopped = streamed(text, ids, stop)
        full = text.decode(ids)
        assert joined(tokens) == reference(full, stop)
        assert stopped == any(string in full for string in stop)

    check()


def test_tokens_that_may_begin_a_stop_string_wait() -> None:
    text = text_of("byte level")
    stream = TextStream(text, ["END", "!!"])
    out = []
    for char in "xEyEN!zEND":
        (id,) = text.encode(char, special=False)
        out.append([each.text for each in stream.push(token(id))])
    assert out == [["x"], [], ["E", "y"], [], [], ["E", "N"], ["!", "z"], [], [], ["", "", ""]]
    assert stream.stopped
    assert stream.finish() == []


def test_a_token_that_holds_the_start_of_a_stop_string_is_cut() -> None:
    text = text_of("byte level")
    ids = [id_of("byte level", "<plain>"), *text.encode("x", special=False)]
    tokens, stopped = streamed(text, ids, ["in>x"])
    assert stopped
    assert [each.text for each in tokens] == ["<pla", ""]


def test_a_stop_string_that_never_ends_is_text_at_the_end() -> None:
    text = text_of("byte level")
    stream = TextStream(text, ["abc", "b"])
    (a,), (b,) = text.encode("a", special=False), text.encode("b", special=False)
    assert [stream.push(token(a)), stream.push(token(b))] == [[], []]  # "abc" would begin earlier
    assert [each.text for each in stream.finish()] == ["a", ""]
    assert stream.stopped
    assert [each.text for each in stream.push(token(a))] == [""]


def test_one_stop_string_need_not_be_in_a_list() -> None:
    text = text_of("byte level")
    assert joined(streamed(text, text.encode("one, two", special=False), ", ")[0]) == "one"


def test_wrong_stop_strings() -> None:
    with pytest.raises(InputError, match="stop string ''"):
        TextStream(text_of("byte level"), ["x", ""])
    with pytest.raises(InputError, match="stop string 7"):
        TextStream(text_of("byte level"), [7])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        TextStream(None, ["x"])


def test_without_a_tokenizer_tokens_pass_without_text() -> None:
    stream = TextStream(None)
    passed = stream.push(token(5))
    assert [(each.id, each.text) for each in passed] == [(5, "")]
    assert stream.finish() == []
    assert not stream.stopped


# The tokenizer itself


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
