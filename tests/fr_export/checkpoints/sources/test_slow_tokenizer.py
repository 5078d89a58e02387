"""A folder with a tokenizer.model only: converted by transformers, or the packages that it takes are named."""

import json
from pathlib import Path

import pytest

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.sources import slow_tokenizer
from fusionroute.runtime.errors import InputError, UnavailableError
from tests.support.systems import Shape, make_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = make_model(tmp_path / "model", Shape(layers=1), 0, expert=True)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"})
    )
    (folder / "tokenizer.model").write_bytes(b"no sentencepiece model")
    return folder


def test_missing_packages_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_tokenizer, "is_sentencepiece_available", lambda: False)
    with pytest.raises(UnavailableError, match=r"has a tokenizer.model and no tokenizer.json, .* pip install sentencepiece protobuf"):
        Checkpoint.open("math", str(folder))


def test_a_broken_model_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_tokenizer, "is_sentencepiece_available", lambda: True)
    with pytest.raises(InputError, match=r"tokenizer.model that transformers cannot convert \(.*\): put a tokenizer.json beside it"):
        Checkpoint.open("math", str(folder))


def test_the_converted_tokenizer_encodes_as_sentencepiece_does(folder: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = [f"the number {number} is {'even' if number % 2 == 0 else 'odd'}, they say" for number in range(500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    checkpoint = Checkpoint.open("math", str(folder))
    expected = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert checkpoint.tokenizer is not None
    for text in ("the number 12 is even", "they say: é or 日本", "odd, odd"):
        assert checkpoint.tokenizer.encode(text, add_special_tokens=False).ids == expected.encode(text)
    assert "tokenizer.json converted from tokenizer.model" in checkpoint.source.notes
    assert not (folder / "tokenizer.json").exists()
