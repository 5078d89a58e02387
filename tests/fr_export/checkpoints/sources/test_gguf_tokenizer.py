"""Tokenizers rebuilt from a GGUF's vocabulary, against the ones they were made from."""

import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from fusionroute.fr_export.checkpoints.sources import gguf_file
from fusionroute.fr_export.checkpoints.sources.gguf_tokenizer import tokenizer_of
from fusionroute.runtime.errors import InputError

TEXTS = [
    "Hello, we can use 1234 words, don't we?", "  two   spaces\n\n\nand lines\t", "Café déjà vu. 日本語 ünïcode – “quotes”", "x=12.5e3; y[7]+=1",
    "I'LL SAY IT'S 2024", "<|end|>a<|end|>", "a<tool>b", "",
]  # fmt: skip
CORPUS = [*TEXTS, *(f"the number {number} is {'even' if number % 2 == 0 else 'odd'}, isn't it? " for number in range(300))]
# of the tokenizer.json files that Llama 3, Qwen 2 and SmolLM were published with
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")


def split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


PRE_TOKENIZERS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama-bpe": split_by(LLAMA3),
    "qwen2": split_by(QWEN2),
}


def trained(pre: Any) -> Any:
    """A tokenizer that cuts text by `pre`. It learns merges across all cuts, so that a wrong one shows."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<bos>", "<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([piece for text in CORPUS for piece in (text, text[-12:], "12 34\n 5")], trainer)
    tokenizer.pre_tokenizer = pre
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def written(file: Path, kind: str, tokens: list[str], kinds: list[int], **more: Any) -> Any:
    """A GGUF with this vocabulary. `more`: keys below tokenizer.ggml."""
    writer = gguf.GGUFWriter(file, more.pop("architecture", "llama"))
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for key, value in more.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)]
        add(f"tokenizer.ggml.{key}", value)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return gguf_file.read(file)


def of_bpe(file: Path, original: Any, pre: str, **more: Any) -> Any:
    """Rebuild a byte-level tokenizer through a GGUF."""
    import json

    vocabulary = sorted(original.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    kinds = [3 if token in ("<bos>", "<|end|>") else 4 if token == "<tool>" else 1 for token in tokens]
    merges = [" ".join(merge) for merge in json.loads(original.to_str())["model"]["merges"]]
    return tokenizer_of("It", written(file, "gpt2", tokens, kinds, pre=pre, merges=merges, bos_token_id=0, eos_token_id=1, **more))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_a_byte_level_tokenizer_encodes_as_its_original(pre: str, tmp_path: Path) -> None:
    original = trained(PRE_TOKENIZERS[pre])
    rebuilt = of_bpe(tmp_path / "m.gguf", original, pre, add_bos_token=False)
    assert rebuilt.get_vocab() == original.get_vocab()
    shuffled = random.Random(0)
    texts = TEXTS + ["".join(shuffled.sample(" ".join(TEXTS), 40)) for _ in range(50)]
    for text in texts:
        assert rebuilt.encode(text).ids == original.encode(text).ids, text
        assert rebuilt.decode(rebuilt.encode(text).ids) == original.decode(original.encode(text).ids)
    special = {token.content: token.special for token in rebuilt.get_added_tokens_decoder().values()}
    assert special == {"<bos>": True, "<|end|>": True, "<tool>": False}


@pytest.mark.parametrize(
    ("pre", "flags", "first", "last"),
    [
        ("smollm", {}, False, False),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_ends_are_added_as_the_flags_and_else_the_kind_say(
    pre: str, flags: dict[str, bool], first: bool, last: bool, tmp_path: Path
) -> None:
    rebuilt = of_bpe(tmp_path / "m.gguf", trained(PRE_TOKENIZERS[pre]), pre, **flags)
    plain = rebuilt.encode("even", add_special_tokens=False).ids
    assert rebuilt.encode("even").ids == [0] * first + plain + [1] * last


@pytest.mark.parametrize("gemma", [False, True])
def test_a_sentencepiece_tokenizer_encodes_as_sentencepiece_does(gemma: bool, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(tmp_path / "m"), vocab_size=420, model_type="bpe", byte_fallback=True,
        character_coverage=0.98, minloglevel=2, add_dummy_prefix=not gemma, remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    pieces = range(original.vocab_size())
    kinds = [2 if original.is_unknown(i) else 3 if original.is_control(i) else 6 if original.is_byte(i) else 1 for i in pieces]
    scores = [original.get_score(i) for i in pieces]
    keys = {"scores": scores, "add_space_prefix": not gemma, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    file = written(
        tmp_path / "m.gguf", "llama", [original.id_to_piece(i) for i in pieces], kinds, architecture="gemma2" if gemma else "llama", **keys
    )
    rebuilt = tokenizer_of("It", file)
    assert rebuilt is not None
    for text in (text for text in TEXTS if text and "<" not in text):
        assert rebuilt.encode(text).ids == [1, *original.encode(text)], text
        assert rebuilt.decode(rebuilt.encode(text).ids) == original.decode(original.encode(text)) == text


def test_kinds_that_cannot_be_rebuilt_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"It has a tokenizer of the kind 'rwkv', which cannot be rebuilt: put its tokenizer.json beside it"
    ):
        tokenizer_of("It", written(tmp_path / "a.gguf", "rwkv", ["a"], [1]))
    with pytest.raises(InputError, match=r"It has the pre-tokenizer 'new', which is not known here: put the tokenizer.json"):
        tokenizer_of("It", written(tmp_path / "b.gguf", "gpt2", ["a"], [1], pre="new"))
