"""Whole runs on the toy: what is learnt and written; interrupted, repeated and adapted runs."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.training.curves import draw
from fusionroute.fr_export.training.folder import Work
from fusionroute.fr_export.training.recipe import Stage
from fusionroute.fr_export.training.train import train
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.errors import InputError
from tests.fr_export.training.conftest import CYCLES, SHAPE, Toy
from tests.support.exporting import export_checkpoints

SFT, MIXED = Stage("sft", 2e-3, 5e-2, max_steps=6), Stage("mixed", 1e-3, 1e-2, max_steps=6)


class Interrupted(Exception):
    """The run was cut off."""


class CutOff(Stages):
    """A display that breaks off after a number of steps of a stage."""

    def __init__(self, **steps: int) -> None:
        super().__init__(Console(quiet=True))
        self._left = steps

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        def counted(_: float) -> None:
            if not self._left[key]:
                raise Interrupted
            self._left[key] -= 1

        key = name.removeprefix("stage ")
        with super().stage(name, total) as advance:
            yield counted if key in self._left else advance


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_router_learns_to_route_and_runs_exported(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionroute.fr_export.training.train.draw", draw)
    stages = Stage("sft", 1e-2, 5e-2, epochs=3), Stage("mixed", 1e-3, 5e-2, epochs=1)
    report = train(toy.request(tmp_path / "router", *stages, recipe={"optimizer": "muon"}, keep_stages=True))
    assert [stage["steps"] for stage in report.stages] == [3 * 16, 16 + 3]
    out = tmp_path / "router"
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "routing_head.safetensors", "loss.png", "losses.json"),
        "fusion.json",
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "training.json", "stages"),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["router"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    System.open(FAMILIES["llama3"], str(out / "stages" / "sft"), toy.experts)
    assert not equal(weights(out), weights(out / "stages" / "sft"))
    bundle = export_checkpoints(tmp_path / "bundle", SHAPE, str(out), toy.experts, ("fp32",))
    right = total = 0
    with FusionRuntime.load(bundle, precision="fp32") as rt:
        for name, cycle in CYCLES.items():
            for start in range(len(cycle)):
                text = "".join(cycle[(start + n) % len(cycle)] for n in range(8))
                experts = rt.score(rt.encode(text)).experts[2:-1]  # after two letters it is clear what they are
                right += sum(rt.expert_names[n] == name for n in experts)
                total += len(experts)
    assert right / total > 0.95
    curves = json.loads((out / "losses.json").read_text())["stages"]
    assert [stage["name"] for stage in curves] == ["sft", "mixed"]
    assert curves[0]["points"][-1]["routing_loss"] < 0.5 < curves[0]["points"][0]["routing_loss"]
    assert curves[1]["points"][-1]["step"] == 19
    assert any(point.get("reward_accuracy", 0) > 0.9 for point in curves[1]["points"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one(toy: Toy, tmp_path: Path, optimizer: str) -> None:
    recipe = {"optimizer": optimizer, "accumulation": 2, "batch_size": 4}

    def request(out: str, **changes: Any) -> Any:
        return toy.request(tmp_path / out, SFT, MIXED, recipe=recipe, checkpoint_every=2, **changes)

    train(request("whole"))
    for stage, steps in (("sft", 3), ("mixed", 5)):
        with pytest.raises(Interrupted):
            train(request(stage), CutOff(**{stage: steps}))
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(stage)] == [f"{stage}.unfinished"]
        checkpoints = sorted(path.name for path in (tmp_path / f"{stage}.unfinished" / stage).iterdir())
        assert checkpoints == [f"checkpoint-{steps - 1}"]
        # not one step is done again that a checkpoint has
        remaining = {stage: 6 - (steps - 1)} | ({"sft": 0} if stage == "mixed" else {})
        report = train(request(stage, resume=True), CutOff(**remaining))
        assert [done["steps"] for done in report.stages] == [6, 6]
        assert equal(weights(tmp_path / "whole"), weights(tmp_path / stage))
        curves = [json.loads((tmp_path / out / "losses.json").read_text())["stages"] for out in ("whole", stage)]
        assert [[point["step"] for point in part["points"]] for part in curves[0]] == [list(range(1, 7))] * 2
        assert [part["points"] for part in curves[0]] == [part["points"] for part in curves[1]]
        assert not (tmp_path / f"{stage}.unfinished").exists()


def test_interrupted_runs_are_neither_mixed_up_nor_lost(toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        train(toy.request(out, SFT), CutOff(sft=3))
    assert not list(tmp_path.iterdir())  # nothing to go on from: nothing left behind
    with pytest.raises(InputError, match="no interrupted run"):
        train(toy.request(out, SFT, resume=True))
    with pytest.raises(Interrupted):
        train(toy.request(out, SFT, checkpoint_every=2), CutOff(sft=3))
    with pytest.raises(InputError, match="--resume to go on"):
        train(toy.request(out, SFT, checkpoint_every=2))
    with pytest.raises(InputError, match=r"had other settings \(recipe\)"):
        train(toy.request(out, SFT, checkpoint_every=2, resume=True, recipe={"seed": 1}))
    with pytest.raises(InputError, match=r"had other settings \(data\)"):
        train(toy.request(out, SFT, checkpoint_every=2, resume=True, sft=Path(toy.sft).with_name("letters.jsonl")))
    train(toy.request(out, SFT, checkpoint_every=2, force=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_seed_decides_the_weights(toy: Toy, tmp_path: Path) -> None:
    contents = []
    for number, seed in enumerate((0, 0, 1)):
        train(toy.request(tmp_path / str(number), SFT, recipe={"seed": seed, "batch_tokens": 128}))
        contents.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_lora_changes_the_linear_layers_and_the_head_alone(toy: Toy, tmp_path: Path) -> None:
    train(toy.request(tmp_path / "out", SFT, MIXED, recipe={"lora_rank": 4}, keep_stages=True, merge=True))
    base, trained, after_sft = weights(Path(toy.base)), weights(tmp_path / "out"), weights(tmp_path / "out" / "stages" / "sft")
    assert trained.pop("routing_head.weight").any()
    assert trained.keys() == base.keys() and after_sft.keys() - {"routing_head.weight"} == base.keys()
    changed = {name for name in base if not torch.equal(base[name], trained[name])}
    assert changed == {name for name in base if name.endswith("proj.weight")}
    for name in changed:
        rank = int(torch.linalg.matrix_rank(trained[name] - base[name], rtol=1e-3))
        assert rank == 4, name
        assert not torch.equal(trained[name], after_sft[name])


def test_direct_fine_tuning_has_no_head_and_learns_preferences(toy: Toy, tmp_path: Path) -> None:
    report = train(toy.request(tmp_path / "out", SFT, Stage("cdpo", 1e-3, max_steps=20), experts={}, dtype="bfloat16"))
    assert not (tmp_path / "out" / "routing_head.safetensors").exists()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "routing_loss" not in report.stages[0]["last"]
    points = json.loads((tmp_path / "out" / "losses.json").read_text())["stages"][1]["points"]
    assert points[0]["dpo_loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: the policy still is the reference
    assert points[-1]["dpo_loss"] < 0.6


def test_cdpo_goes_on_from_a_router_with_a_head_and_leaves_the_head(toy: Toy, tmp_path: Path) -> None:
    cdpo = Stage("cdpo", 1e-3, max_steps=3)
    with pytest.raises(InputError, match="no routing head"):
        train(toy.request(tmp_path / "out", cdpo))
    train(toy.request(tmp_path / "sft", SFT))
    train(toy.request(tmp_path / "out", cdpo, router=str(tmp_path / "sft"), sft=None))
    before, after = weights(tmp_path / "sft"), weights(tmp_path / "out")
    assert {name for name in before if torch.equal(before[name], after[name])} == {"routing_head.weight"}


def test_nothing_but_a_trained_router_is_replaced(toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(InputError, match="is not replaced"):
        train(toy.request(out, SFT, force=True))
    shutil.rmtree(out)
    train(toy.request(out, SFT))
    with pytest.raises(InputError, match="add --force"):
        train(toy.request(out, SFT))
    before = weights(out)
    with pytest.raises(Interrupted):
        train(toy.request(out, SFT, force=True, recipe={"seed": 1}), CutOff(sft=3))
    assert equal(weights(out), before)
    train(toy.request(out, SFT, force=True, recipe={"seed": 1}))
    assert not equal(weights(out), before)
    folder = tmp_path / "other.unfinished"
    folder.mkdir()
    (folder / "mine").touch()
    with pytest.raises(InputError, match="is no interrupted run"):
        Work(tmp_path / "other", {}, keep=False, resume=False, force=True, writer=True)


def test_a_diverging_run_ends_in_one_sentence(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"diverged .*lower --lr"):
        train(toy.request(tmp_path / "out", Stage("sft", 1e30, max_steps=6)))
    assert not list(tmp_path.iterdir())
