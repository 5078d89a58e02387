"""A toy that separates cleanly: one expert continues the alphabet, the other counts.

The router has to learn whom to ask.
"""

import gc
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.training.data import Encoder
from fusionroute.fr_export.training.recipe import Recipe, Stage
from fusionroute.fr_export.training.request import TrainingRequest
from fusionroute.fr_export.training.train import train
from tests.support.systems import Shape, make_model, write_tokenizer

CYCLES = {"letters": "abcdefghijklm", "digits": "0123456789"}
SHAPE = Shape("llama3", hidden=32, heads=2, kv_heads=1, head_dim=16, vocab=280, layers=1)
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@dataclass(frozen=True)
class Toy:
    """Folders of the checkpoints, and JSONL files."""

    base: str
    experts: dict[str, str]
    sft: Path
    preferences: Path
    cache: Path

    def request(self, out: Path, *stages: Stage, recipe: dict[str, Any] | None = None, **changes: Any) -> TrainingRequest:
        """Training of a router from the base on all data, in float32."""
        fields: dict[str, Any] = {
            "experts": self.experts,
            "sft": self.sft,
            "preferences": self.preferences,
            "cache": self.cache,
            "family": FAMILIES["llama3"],
            "router": self.base,
        }
        return TrainingRequest(out=out, recipe=Recipe(stages, **({"batch_size": 16} | (recipe or {}))), **(fields | changes))

    @property
    def encoder(self) -> Encoder:
        return Encoder(Checkpoint.open("router", self.base, FAMILIES["llama3"]))


def sample(cycle: str, rng: random.Random, wrong: bool = False) -> tuple[str, str]:
    """A prompt and its continuation around the cycle, or a wrong one."""
    start = rng.randrange(len(cycle))
    text = [cycle[(start + n) % len(cycle)] for n in range(8)]
    cut = rng.randint(2, 4)
    return "".join(text[:cut]), "".join(reversed(text[cut:])) if wrong else "".join(text[cut:])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, and no picture but in the test of pictures, which takes longer to draw than the toy to train."""
    torch.set_num_threads(1)
    monkeypatch.setattr("fusionroute.fr_export.training.train.draw", lambda _, file: file.touch())


def write_lines(file: Path, lines: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage before every stage, and the libraries themselves are much to look through
    root = tmp_path_factory.mktemp("toy")
    base = make_model(root / "base", SHAPE, 0, expert=False)
    write_tokenizer(base, SHAPE.vocab)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    rng = random.Random(0)
    files = {}
    for name, cycle in CYCLES.items():
        files[name] = write_lines(
            root / f"{name}.jsonl", [dict(zip(("prompt", "completion"), sample(cycle, rng), strict=True)) for _ in range(128)]
        )
    sft = root / "sft.jsonl"
    sft.write_text("".join(file.read_text() for file in files.values()))
    preferences = []
    for _ in range(24):
        for cycle in CYCLES.values():
            state = rng.getstate()
            prompt, chosen = sample(cycle, rng)
            rng.setstate(state)
            preferences.append({"prompt": prompt, "chosen": chosen, "rejected": sample(cycle, rng, wrong=True)[1]})
    toy = Toy(
        str(base), {name: str(root / name) for name in CYCLES}, sft, write_lines(root / "preferences.jsonl", preferences), root / "cache"
    )
    for name, file in files.items():
        recipe = {"optimizer": "muon", "batch_size": 32}
        train(toy.request(root / name, Stage("sft", 1e-2, max_steps=60), recipe=recipe, experts={}, sft=file))
    return toy
