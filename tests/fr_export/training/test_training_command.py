"""`python -m fr_export.training`: what its flags become, what it prints where, and how it ends."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.commands.main import run
from fusionroute.fr_export.training.data import Row, read_preferences, read_sft
from fusionroute.fr_export.training.recipe import Recipe, Stage
from fusionroute.fr_export.training.request import TrainingRequest
from fusionroute.fr_export.training.train import Report, train
from fusionroute.runtime.errors import InputError
from tests.fr_export.training.conftest import Toy
from tests.support.commands import Command, in_folder
from tests.support.paths import REPOSITORY
from tests.support.systems import Shape, make_model


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    with in_folder("training", lambda: run("train"), tmp_path, monkeypatch, capsys) as command:
        yield command


@pytest.fixture
def flags(toy: Toy) -> dict[str, object]:
    """Flags of a short run that works."""
    return {"family": "llama3", "router": toy.base, "sft": toy.sft, "out": "out", "cache": toy.cache, "max-steps": 2, "lr": 1e-3}


def line(flags: Mapping[str, object], toy: Toy | None = None) -> list[object]:
    """A command line, with the toy's experts where it is given."""
    experts = [part for name, path in toy.experts.items() for part in ("--expert", f"{name}={path}")] if toy else []
    return [*(part for name, value in flags.items() for part in (f"--{name}", value)), *experts]


def test_a_run_prints_its_report(command: Command, flags: dict[str, object], toy: Toy, tmp_path: Path) -> None:
    ended = command(*line(flags | {"preferences": toy.preferences, "max-steps": "2,3"}, toy), "--json")
    assert ended.status == 0, ended.err
    report = json.loads(ended.out)
    assert [(stage["name"], stage["steps"]) for stage in report["stages"]] == [("sft", 2), ("mixed", 3)]
    assert (report["rows"], report["pairs"], report["skipped"]) == (256, 48, 0)
    assert (tmp_path / "out" / "routing_head.safetensors").is_file()
    # no path of the machine travels with a router
    assert str(tmp_path) not in (tmp_path / "out" / "training.json").read_text()
    ended = command(*line(flags | {"max-length": 12}), "--direct", "--force")
    assert ended.status == 0, ended.err
    assert "samples" in ended.out and "skipped as too long" not in ended.out
    assert not (tmp_path / "out" / "routing_head.safetensors").exists()


def test_flags_become_a_request(command: Command, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainingRequest] = []

    def record(request: TrainingRequest, *_: Any) -> Report:
        seen.append(request)
        return Report("out", 0, 0, 0, 0, [])

    monkeypatch.setattr("fusionroute.fr_export.training.train.train", record)
    required = {"family": "llama3", "router": "r", "out": "out"}
    assert command(*line(required | {"sft": "s", "preferences": "p", "precision": "fp32"}, toy)).status == 0
    assert seen[-1].recipe == Recipe((Stage("sft", 1e-5), Stage("mixed", 1e-5)), lora_rank=None)
    assert (seen[-1].sft, seen[-1].preferences, seen[-1].experts) == (Path("s"), Path("p"), toy.experts)
    more = {"sft": "s", "preset": "seed", "optimizer": "muon", "lora-rank": 4, "head-lr": 3e-2, "beta": 0.5, "gradient-accumulation": 2}
    assert command(*line(required | more | {"precision": "bf16", "dtype": "float16", "seed": 7, "warmup": 0.1}, toy)).status == 0
    assert seen[-1].recipe == Recipe(
        (Stage("sft", 1e-3, 3e-2, epochs=10),), 32, None, 2, "muon", 0.1, beta=0.5, lora_rank=4, precision="bf16", seed=7
    )
    assert seen[-1].dtype == "float16"
    several = {"sft": "s", "preferences": "p", "stages": "sft,cdpo", "lr": "1e-3,1e-4", "epochs": "3,1", "batch-tokens": 512}
    assert command(*line(required | several, toy)).status == 0
    assert seen[-1].recipe.stages == (Stage("sft", 1e-3, epochs=3), Stage("cdpo", 1e-4, epochs=1))
    assert seen[-1].recipe.batch_tokens == 512
    assert command(*line(required | {"preferences": "p"}), "--direct").status == 0
    assert [*seen[-1].recipe.stages, seen[-1].experts] == [Stage("cdpo", 1e-5), {}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"family": "gpt"}, "unknown family 'gpt'"),
        ({"stages": "sft,ppo"}, "unknown 'ppo'"),
        ({"preset": "mine"}, "'mine' is not one of 'paper', 'seed'"),
        ({"lr": "fast"}, "'fast' is no comma list of numbers"),
        ({"lr": "0"}, "'0' must be above 0"),
        ({"max-steps": "1.5"}, "'1.5' is no comma list of whole numbers"),
        ({"max-steps": "1,2,3"}, "3 values for 1 stages"),
        ({"optimizer": "sgd"}, "'sgd' is not one of 'adamw', 'muon'"),
        ({"precision": "int8"}, "'int8' is not one of 'fp32', 'bf16'"),
        ({"dtype": "int8"}, "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        ({"expert": "math"}, "'math' is not NAME=SRC"),
        ({"expert": "letters=x"}, "every expert needs a name of its own"),
        ({"batch-size": 1, "batch-tokens": 2}, "both given"),
        ({"warmup": 2}, "Invalid value for '--warmup'"),
    ],
)
def test_wrong_usage(command: Command, flags: dict[str, object], toy: Toy, tmp_path: Path, change: dict[str, object], words: str) -> None:
    ended = command(*line(flags | change, toy))
    assert ended.status == 2
    assert words in " ".join(ended.err.split())
    assert not list(tmp_path.iterdir())


def test_data_is_checked_alone(command: Command, toy: Toy, tmp_path: Path) -> None:
    ended = command("--router", toy.base, "--sft", toy.sft, "--preferences", toy.preferences, "--check-data", "--json")
    assert ended.status == 0, ended.err
    rows, pairs = read_sft(toy.sft, toy.encoder), read_preferences(toy.preferences, toy.encoder)
    sft, preferences = json.loads(ended.out)
    assert (sft["kind"], sft["samples"], preferences["kind"], preferences["samples"]) == ("sft", 256, "preferences", 48)
    assert sft["tokens"][0] == pytest.approx(sum(len(row.ids) for row in rows) / 256, abs=0.1)
    assert preferences["learnt"][3] == max(len(row.labels) for pair in pairs for row in pair)
    repeated = len(rows) - len(set(toy.sft.read_text().splitlines()))
    assert len(sft["duplicates"]) == repeated > 0
    assert not list(tmp_path.iterdir())
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": ""}\n{"prompt": "a", "completion": "bcdefghij"}\n{"answer": 1}\n')
    ended = command("--router", toy.base, "--sft", bad, "--check-data", "--max-length", 5)
    assert ended.status == 1
    assert f"{bad}:1: completion: is empty" in ended.out and f"{bad}:3: expected" in ended.out
    assert f"{bad}:2: longer than 5 tokens, so it will be skipped (a warning)" in ended.out
    assert ended.err.splitlines()[-1] == f"error: 2 lines of {bad} cannot be learnt from: mend or remove them."
    assert command("--router", toy.base, "--check-data").status == 2  # no data
    assert command("--router", toy.base, "--sft", toy.sft, "--direct").status == 2  # nowhere to write


def test_lora_and_full_become_a_rank(command: Command, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainingRequest] = []

    def record(request: TrainingRequest, *_: Any) -> Report:
        seen.append(request)
        return Report("out", 0, 0, 0, 0, [])

    monkeypatch.setattr("fusionroute.fr_export.training.train.train", record)
    required = line({"router": "r", "out": "out", "sft": "s"}, toy)
    for flags, rank in (([], None), (["--lora"], 16), (["--full"], 0), (["--lora-rank", 8], 8), (["--lora", "--lora-rank", 8], 8)):
        assert command(*required, *flags).status == 0
        assert (seen[-1].recipe.lora_rank, seen[-1].merge, seen[-1].family) == (rank, False, None)
    assert command(*required, "--full", "--lora-rank", 8).status == 2
    assert command(*required, "--merge", "--base", "b").status == 0
    assert (seen[-1].merge, seen[-1].base) == (True, "b")


def test_experts_or_direct_and_data(command: Command, flags: dict[str, object], toy: Toy) -> None:
    for arguments in (line(flags), [*line(flags, toy), "--direct"], [*line({k: v for k, v in flags.items() if k != "sft"}), "--direct"]):
        assert command(*arguments).status == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"router": "nowhere"}, "nowhere does not exist"),
        ({"sft": "none.jsonl"}, "none.jsonl cannot be read"),
        ({"stages": "mixed"}, "learn from preferences: name them with --preferences"),
        ({"max-length": 3}, "longer than 3 tokens: raise --max-length"),
        ({"out": "taken"}, "is no router that was trained here"),
        ({"family": "gemma2"}, "use --family llama3"),
        ({"beta": "inf"}, "The beta is inf; expected a finite number"),
        ({"head-lr": "inf"}, "The learning rate of stage sft is inf"),
    ],
)
def test_what_does_not_fit_ends_in_one_sentence(
    command: Command, flags: dict[str, object], toy: Toy, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    ended = command(*line(flags | change, toy))
    last = ended.err.splitlines()[-1]
    assert (ended.status, ended.out) == (1, "")
    assert last.startswith("error: ") and last.endswith(".") and words in last and "Traceback" not in ended.err
    assert {path.name for path in tmp_path.iterdir()} == {"taken"}


def test_checkpoints_that_do_not_fit_are_refused(toy: Toy, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", Shape(hidden=32, heads=2, head_dim=16, vocab=300, layers=1, tokenizer=True), 0, expert=True)
    stage = Stage("sft", 1e-3, max_steps=1)
    with pytest.raises(InputError, match="another vocabulary"):
        train(toy.request(tmp_path / "out", stage, experts={"other": str(other)}))
    trained = tmp_path / "trained"
    shutil.copytree(toy.base, trained)
    for head, reason in (
        ({"routing_head.weight": torch.ones(3, 32)}, "has a routing head of shape"),
        ({"routing_head.weight": torch.ones(2, 32), "routing_head.bias": torch.ones(2)}, "with a bias"),
    ):
        save_file(head, trained / "routing_head.safetensors")
        with (
            pytest.raises(InputError, match=reason),
            patch("fusionroute.fr_export.training.train.expert_scores", side_effect=AssertionError("too late")),
        ):
            train(toy.request(tmp_path / "out", stage, router=str(trained)))
    assert {path.name for path in tmp_path.iterdir()} == {"other", "trained"}


def test_rows_can_be_given_from_python(toy: Toy, tmp_path: Path) -> None:
    rows = read_sft(toy.sft, toy.encoder)
    # only the end is learnt
    partly = [Row.of([(row.ids[:-1].tolist(), False), (row.ids[-1:].tolist(), True)]) for row in rows]
    report = train(toy.request(tmp_path / "out", Stage("sft", 1e-2, max_steps=10), sft=partly))
    assert report.stages[0]["last"]["lm_loss"] < 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun --nproc_per_node 2", "accelerate launch --multi_gpu --num_processes 2"])
def test_two_processes_give_what_one_gives(flags: dict[str, object], toy: Toy, tmp_path: Path, launcher: str) -> None:
    more = flags | {
        "preferences": toy.preferences,
        "max-steps": "6,12",
        "dtype": "float32",
        "lr": 1e-3,
        "head-lr": 1e-2,
        "optimizer": "muon",
    }
    names = {"one": (sys.executable, 8), "two": (f"{Path(sys.executable).parent}/{launcher}", 4)}
    for name, (program, size) in names.items():
        arguments = map(str, line(more | {"batch-size": size, "out": tmp_path / name}, toy))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": "29587"}
        subprocess.run(
            [*program.split(), "-m", "fusionroute.fr_export.training", *arguments],
            check=True,
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
        )
    assert json.loads((tmp_path / "two" / "training.json").read_text())["processes"] == 2
    for file in ("model.safetensors", "routing_head.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in names)
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-4)
