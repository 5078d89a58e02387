"""Small tokenizers of every kind of decoder, and streams of their tokens. Needs no torch."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime.text import Text, Token
from fusionroute.runtime.text_stream import TextStream

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
