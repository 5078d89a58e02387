"""What becomes of an architecture that cannot be traced."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config

from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES, Family
from fusionroute.runtime.errors import FusionError

GPT2 = Family("gpt2", "gpt2", 0.0, "fp16", {"other": ("fp16",)}, lambda where, config: None)


def test_it_is_refused_in_one_sentence_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, GPT2.name, GPT2)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64, num_key_value_heads=2, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    save_file({"routing_head.weight": torch.zeros(1, 32)}, tmp_path / "model" / "routing_head.safetensors")
    model, out = str(tmp_path / "model"), tmp_path / "dist" / "bundle"
    request = Request(GPT2, model, {"expert": model}, ("fp32",), ("ort:cpu",), out)
    with pytest.raises(
        FusionError, match=r"^The family gpt2 cannot be traced, since it lacks rotary embeddings at 'model.rotary_emb': .*\.$"
    ):
        export(request, Stages(Console(quiet=True)))
    assert not list(out.parent.iterdir())
