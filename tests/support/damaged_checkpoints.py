"""Checkpoints made unfit for export, one damage at a time, and the sentence that refuses them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.runtime.errors import FusionError, InputError
from tests.support.systems import Shape, make_model

EMBEDDING = "model.embed_tokens.weight"
Damage = Callable[[Path], object]


def open_system(root: Path, family: str = "llama3", **options: Any) -> System:
    return System.open(FAMILIES[family], str(root / "router"), {name: str(root / name) for name in ("expert0", "expert1")}, **options)


def refusal(root: Path, kind: type[FusionError] = InputError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        open_system(root, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith("."), sentence
    return sentence


def edit(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content |= fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def retensor(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def shard(folder: Path) -> None:
    """Split model.safetensors into two shards with an index."""
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    files = {f"model-0000{n}-of-00002.safetensors": dict(part) for n, part in ((1, tensors[:3]), (2, tensors[3:]))}
    for file, part in files.items():
        save_file(part, folder / file)
    index(folder, {name: file for file, part in files.items() for name in part})


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def then(*damages: Damage) -> Damage:
    """One damage after the other."""

    def all_of_them(root: Path) -> None:
        for damage in damages:
            damage(root)

    return all_of_them


def remove(name: str) -> Damage:
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def cut(name: str, keep: float = 0.5) -> Damage:
    def damage(root: Path) -> None:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def indexed(weight_map: object) -> Damage:
    return lambda root: index(root / "expert1", weight_map)


def sharded(root: Path) -> None:
    shard(root / "expert1")


def config(model: str = "expert1", **fields: Any) -> Damage:
    return lambda root: edit(root / model / "config.json", **fields)


def write(name: str, content: bytes | str) -> Damage:
    def damage(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor], file: str = "expert1/model.safetensors") -> Damage:
    return lambda root: retensor(root / file, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))


def head(change: Callable[[torch.Tensor], torch.Tensor], name: str = "routing_head.weight") -> Damage:
    return tensor(name, change, "router/routing_head.safetensors")


def other_vocabulary(root: Path) -> None:
    file = root / "expert1" / "tokenizer.json"
    file.write_text(file.read_text().replace("<unused7>", "<used7>"))


def other_special(root: Path) -> None:
    file = root / "expert1" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<eos>"]
    file.write_text(json.dumps(content))
    (root / "expert1" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>"}))


def without_tokenizers(root: Path, vocab: int) -> None:
    """A system without tokenizers, one model of which has another vocabulary."""
    for folder in root.iterdir():
        (folder / "tokenizer.json").unlink()
    shutil.rmtree(root / "expert1")
    make_model(root / "expert1", Shape(heads=2, kv_heads=1, head_dim=16, hidden=32, layers=1, vocab=vocab), 0, expert=True)


def smaller_embedding(root: Path) -> None:
    retensor(root / "expert1/model.safetensors", lambda t: t.update({n: t[n][:290].clone() for n in (EMBEDDING, "lm_head.weight")}))
    edit(root / "expert1/config.json", vocab_size=290)
