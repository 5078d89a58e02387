"""Training through LoRA adapters: the folder is PEFT's own, and says what the merged model says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.checkpoints.torch_model import torch_model
from fusionroute.fr_export.training import size
from fusionroute.fr_export.training.recipe import Stage
from fusionroute.fr_export.training.train import train
from fusionroute.runtime.errors import FusionError, InputError
from tests.fr_export.training.conftest import Toy
from tests.fr_export.training.test_trainer import CutOff, Interrupted, equal, weights
from tests.support.systems import Shape, make_model, write_tokenizer

SFT, MIXED = Stage("sft", 2e-3, 5e-2, max_steps=6), Stage("mixed", 1e-3, 1e-2, max_steps=6)
LORA = {"lora_rank": 4}


def base_of(toy: Toy) -> Any:
    return AutoModelForCausalLM.from_pretrained(toy.base, dtype=torch.float32)


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


def test_peft_reads_the_adapter_as_the_merged_model(toy: Toy, tmp_path: Path) -> None:
    for out, merge in (("adapter", False), ("merged", True)):
        train(toy.request(tmp_path / out, SFT, MIXED, recipe=LORA, merge=merge, keep_stages=True))
    adapter = tmp_path / "adapter"
    files = {path.name for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "routing_head.safetensors", "fusion.json", "tokenizer.json"} <= files
    assert not {"config.json", "model.safetensors"} & files
    assert (adapter / "adapter_model.safetensors").stat().st_size < (Path(toy.base) / "model.safetensors").stat().st_size
    for stage in (Path(), Path("stages/sft")):
        peft_logits = logits(peft.PeftModel.from_pretrained(base_of(toy), adapter / stage))
        merged_logits = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / stage, dtype=torch.float32))
        torch.testing.assert_close(peft_logits, merged_logits, rtol=1e-4, atol=1e-5)
        assert (peft_logits - logits(base_of(toy))).abs().max() > 1e-2
        heads = [load_file(tmp_path / out / stage / "routing_head.safetensors")["routing_head.weight"] for out in ("adapter", "merged")]
        assert torch.equal(*heads) and heads[0].any()
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["inference_mode"]) == (toy.base, 4, True)
    assert set(config["target_modules"]) == {*("q_proj", "k_proj", "v_proj", "o_proj"), *("gate_proj", "up_proj", "down_proj")}
    assert FusionSettings.read(adapter) == FusionSettings()


def test_experts_are_adapters_without_a_head(toy: Toy, tmp_path: Path) -> None:
    train(toy.request(tmp_path / "out", Stage("sft", 1e-2, max_steps=3), recipe=LORA, experts={}, dtype="bfloat16"))
    assert not (tmp_path / "out" / "routing_head.safetensors").exists() and not (tmp_path / "out" / "fusion.json").exists()
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_a_resumed_run_equals_an_uninterrupted_one(toy: Toy, tmp_path: Path) -> None:
    def request(out: str, **changes: Any) -> Any:
        return toy.request(tmp_path / out, SFT, MIXED, recipe=LORA, checkpoint_every=2, **changes)

    train(request("whole"))
    with pytest.raises(Interrupted):
        train(request("cut"), CutOff(mixed=5))
    train(request("cut", resume=True), CutOff(mixed=2, sft=0))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_large_models_are_trained_through_adapters(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open("router", toy.base)
    count = sum(parameter.numel() for parameter in base_of(toy).parameters())
    assert size.parameters(checkpoint) == count and size.default_rank(checkpoint)[0] == 0
    with monkeypatch.context() as context:
        context.setattr(size, "_memory", lambda: 16 * count)  # nothing left for activations
        assert size.default_rank(checkpoint)[0] == 16
    monkeypatch.setattr(size, "LARGE", count - 1)
    report = train(toy.request(tmp_path / "out", Stage("sft", max_steps=1), recipe={"lora_rank": None}))
    assert report.lora_rank == 16
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_router_goes_on_from_an_adapter_among_experts_that_are_adapters(toy: Toy, tmp_path: Path) -> None:
    """The paper's start, an instruction expert, as people have it: everything is a LoRA adapter of one base."""
    for seed, (name, expert) in enumerate(toy.experts.items()):
        sft = Path(expert).with_suffix(".jsonl")
        recipe = {"lora_rank": 4 + 2 * seed, "seed": seed, "optimizer": "muon"}
        train(toy.request(tmp_path / name, Stage("sft", 1e-2, max_steps=20), recipe=recipe, experts={}, sft=sft))
    experts = {name: str(tmp_path / name) for name in toy.experts}
    start, *_ = experts.values()
    request = toy.request(tmp_path / "router", SFT, MIXED, recipe={"lora_rank": None}, router=start, experts=experts)
    report = train(request)
    assert report.lora_rank == 4  # its start's
    adapter = peft.PeftModel.from_pretrained(base_of(toy), tmp_path / "router")
    system = System.open(None, str(tmp_path / "router"), experts)
    torch.testing.assert_close(logits(adapter), logits(torch_model(system.router)), rtol=1e-4, atol=1e-5)
    before = logits(peft.PeftModel.from_pretrained(base_of(toy), start))
    assert 1e-2 < (logits(adapter) - before).abs().max() < (logits(base_of(toy)) - before).abs().max()
    # all weights, from the same start: a step too small to see
    still = replace(request.recipe, stages=(Stage("sft", 1e-12, max_steps=1),), lora_rank=0)
    train(replace(request, out=tmp_path / "whole", recipe=still))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    torch.testing.assert_close(logits(whole), before, rtol=1e-4, atol=1e-5)


def test_the_base_can_be_named(toy: Toy, tmp_path: Path) -> None:
    recipe = {"lora_rank": 2}
    train(toy.request(tmp_path / "expert", Stage("sft", 1e-2, max_steps=1), recipe=recipe, experts={}))
    config = tmp_path / "expert" / "adapter_config.json"
    config.write_text(config.read_text().replace(toy.base, "owner/elsewhere"))
    experts = {"expert": str(tmp_path / "expert")}
    with pytest.raises(FusionError, match="name its base with --base"):
        train(toy.request(tmp_path / "out", SFT, recipe=recipe, experts=experts))
    train(toy.request(tmp_path / "out", SFT, recipe=recipe, router=str(tmp_path / "expert"), experts=experts, base=toy.base))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == toy.base
    with pytest.raises(InputError, match="all models of this run are whole ones"):
        train(toy.request(tmp_path / "other", SFT, base=toy.base))


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral", "olmo2", "phi3", "smollm3"])
def test_adapters_of_every_family_are_read_as_peft_reads_them(family: str, tmp_path: Path, toy: Toy) -> None:
    """Packed projections, norms after attention, softcaps: training knows of none of them."""
    base = make_model(tmp_path / "base", Shape(family, hidden=32, heads=2, kv_heads=1, head_dim=16, vocab=280, layers=2), 1, expert=False)
    write_tokenizer(base, 280)
    request = toy.request(tmp_path / "expert", Stage("sft", 5e-2, max_steps=2), recipe=LORA, experts={}, router=str(base), family=None)
    report = train(request)
    assert report.lora_rank == 4
    plain = torch_model(Checkpoint.open("base", str(base)))
    merged = logits(torch_model(Checkpoint.open("expert", str(tmp_path / "expert"))))
    assert (merged - logits(plain)).abs().max() > 1e-2
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "expert")), merged, rtol=1e-4, atol=1e-4)
