"""`fusionroute init-router`: routers with an untrained head, which the exporter and the trainer read."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.commands.main import run
from fusionroute.fr_export.training.init_router import centred_head, init_router
from fusionroute.fr_export.training.recipe import Stage
from fusionroute.fr_export.training.train import train
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.errors import InputError
from tests.fr_export.training.conftest import SHAPE, Toy
from tests.support.commands import Command, in_folder
from tests.support.exporting import export_checkpoints
from tests.support.gguf_models import with_byte_vocabulary, write_gguf
from tests.support.systems import Shape, make_model


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    with in_folder("init-router", lambda: run("init-router"), tmp_path, monkeypatch, capsys) as command:
        yield command


def test_a_system_can_be_tried_before_it_is_trained(toy: Toy, tmp_path: Path) -> None:
    router = init_router(toy.base, 2, tmp_path / "router")
    assert router.linked == 1 and all(0.2 < share < 0.8 for share in router.shares)
    weights = tmp_path / "router" / "model.safetensors"
    assert (Path(toy.base) / "model.safetensors").samefile(weights)
    bundle = export_checkpoints(tmp_path / "bundle", SHAPE, str(tmp_path / "router"), toy.experts, ("fp32",))
    with FusionRuntime.load(bundle, precision="fp32") as rt:
        experts = rt.score(rt.encode("The choice changes from token to token in any text of some length.")).experts
        assert set(np.asarray(experts).tolist()) == {0, 1}
    train(toy.request(tmp_path / "router", Stage("sft", 1e-3, max_steps=1), router=str(tmp_path / "router"), force=True))
    # the base was linked, not written to
    assert not (Path(toy.base) / "model.safetensors").samefile(tmp_path / "router" / "model.safetensors")


def test_the_command(command: Command, toy: Toy, tmp_path: Path) -> None:
    ended = command(toy.base, "--experts", "letters,digits,others", "--out", "router", "--copy", "--json")
    assert ended.status == 0, ended.err
    report = json.loads(ended.out)
    assert (report["hidden"], report["experts"], report["linked"], len(report["shares"])) == (32, 3, 0, 3)
    head = load_file(tmp_path / "router" / "routing_head.safetensors")["routing_head.weight"]
    assert head.shape == (3, 32) and not (Path(toy.base) / "model.safetensors").samefile(tmp_path / "router" / "model.safetensors")
    ended = command(toy.base, "--experts", 2, "--out", "router", "--zeros")
    assert (ended.status, ended.err.splitlines()[-1].endswith("or name another folder with --out.")) == (1, True)
    ended = command(toy.base, "--experts", 2, "--out", "router", "--zeros", "--force")
    assert ended.status == 0 and "the first expert is always chosen; 1 weight files are links" in ended.out
    assert not load_file(tmp_path / "router" / "routing_head.safetensors")["routing_head.weight"].any()
    assert command(toy.base, "--experts", 0, "--out", "other").status == 2
    assert [path.name for path in tmp_path.iterdir()] == ["router"]


def test_an_adapter_becomes_a_router(toy: Toy, tmp_path: Path) -> None:
    train(toy.request(tmp_path / "expert", Stage("sft", 1e-2, max_steps=2), recipe={"lora_rank": 2}, experts={}))
    router = init_router(str(tmp_path / "expert"), 2, tmp_path / "router")
    assert router.linked == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "routing_head.safetensors", "tokenizer.json", "fusion.json"} <= {
        path.name for path in (tmp_path / "router").iterdir()
    }
    assert not (tmp_path / "router" / "model.safetensors").exists() and not (tmp_path / "router" / "config.json").exists()
    system = System.open(None, str(tmp_path / "router"), {"one": str(tmp_path / "expert"), "two": toy.base})
    assert system.head.weight.shape == (2, 32)


def test_a_gguf_file_becomes_a_router(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", Shape(layers=1), 0, expert=False))
    file = tmp_path / "model.gguf"
    write_gguf(file, model, "llama", more=lambda writer: with_byte_vocabulary(writer, 300))
    assert init_router(str(file), 2, tmp_path / "router").linked == 1
    assert (tmp_path / "router" / "model.gguf").samefile(file)
    system = System.open(None, str(tmp_path / "router"), {"one": str(file), "two": str(file)})
    assert system.head.weight.shape == (2, 64)


def test_a_head_inside_the_weights_is_not_doubled(toy: Toy, tmp_path: Path) -> None:
    init_router(toy.base, 2, tmp_path / "router", copy=True)
    weights = load_file(tmp_path / "router" / "model.safetensors")
    save_file(weights | {"routing_head.weight": torch.ones(2, 32)}, tmp_path / "router" / "model.safetensors")
    (tmp_path / "router" / "routing_head.safetensors").unlink()
    with pytest.raises(InputError, match="is a router already"):
        init_router(str(tmp_path / "router"), 2, tmp_path / "again")


@given(st.integers(2, 40), st.integers(2, 24), st.integers(1, 5), st.integers(0, 99))
def test_scores_are_centred(count: int, hidden: int, experts: int, seed: int) -> None:
    states = torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)) + 5
    scores = (states.double() @ centred_head(states, experts, seed).double().T).numpy()
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scores.std(0, ddof=1), 1, atol=1e-4)
