from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fr_export.training.architectures import FAMILIES
from fr_export.training.domains import DOMAINS, draw_many
from fr_export.training.losses import IGNORE
from fr_export.training.muon import orthogonalise
from fr_export.training.rows import PROMPT, Encoder, batches, collate
from fr_export.training.tiny import build
from fr_export.training.tiny_tokenizer import build_tokenizer


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_what_the_chat_template_gives(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = build_tokenizer(family)
    encoder = Encoder(tokenizer, family)
    first, second = draw_many("instruction", "test", 2, seed=0)
    messages = [
        {"role": "user", "content": first.prompt},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": second.prompt},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    row = encoder.row([first, second], chat=True)
    assert tokenizer.decode(row.ids) == rendered + second.answer + family.end_of_turn
    plain = encoder.row([first], chat=False)
    prompt = tokenizer(first.prompt)["input_ids"]
    assert plain.ids[: len(prompt)] == prompt
    assert plain.owners[: len(prompt)] == [PROMPT] * len(prompt)
    assert tokenizer.decode(plain.ids[len(prompt) :]) == first.answer + family.eos


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_learn_answers_only(name: str) -> None:
    family = FAMILIES[name]
    encoder = Encoder(build_tokenizer(family), family)
    math = DOMAINS.index("math")
    batch = next(batches(encoder, {"composite": 1.0}, seed=0, tokens=512, only=math))
    assert batch.ids.numel() <= 512
    learnt = batch.labels != IGNORE
    assert learnt.any(dim=1).all()
    assert (batch.owners[learnt] == math).all()
    assert (batch.labels[:, :-1][learnt[:, :-1]] == batch.ids[:, 1:][learnt[:, :-1]]).all()
    assert not learnt[:, -1].any()


def test_collate_pads_at_the_end() -> None:
    family = FAMILIES["llama3"]
    encoder = Encoder(build_tokenizer(family), family)
    rows = [encoder.row([sample], chat=False) for sample in draw_many("code", "train", 9, seed=0)]
    batch = collate(rows)
    for row, ids, labels in zip(rows, batch.ids.tolist(), batch.labels.tolist(), strict=True):
        assert ids[: len(row.ids)] == row.ids
        expected = [b if owner != PROMPT else IGNORE for (_, b), owner in zip(pairwise(row.ids), row.owners[1:], strict=True)]
        assert labels[: len(row.ids) - 1] == expected
        assert set(labels[len(row.ids) - 1 :]) == {IGNORE}


def test_orthogonalise_pushes_singular_values_towards_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 16, 40), (2, 40, 16), (1, 24, 24)):
        singular = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert singular.max() < 1.3
        assert singular.median() > 0.6


def test_build_replaces_an_older_system_and_leaves_nothing_beside(tmp_path: Path) -> None:
    out = tmp_path / "gemma2"
    out.mkdir()
    (out / "stale").touch()
    build(FAMILIES["gemma2"], out, scale=0.002, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["gemma2"]
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    folders = ["router", *(f"experts/{name}" for name in DOMAINS)]
    each = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    expected = {f"{folder}/{name}" for folder in folders for name in (*each, "tokenizer_config.json")}
    assert files == expected | {"router/routing_head.safetensors"}
