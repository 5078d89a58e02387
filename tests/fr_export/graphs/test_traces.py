"""What becomes of an architecture that cannot be traced."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import Family, Preset
from fusionroute.runtime.errors import FusionError

NEOX = Family("neox", "gpt_neox", 0.0, "fp16", Preset(None, {}), {"other": ("fp16",)}, lambda where, config: None)


def test_it_is_refused_in_one_sentence_before_anything_is_written(tmp_path: Path) -> None:
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    save_file({"routing_head.weight": torch.zeros(1, 32)}, tmp_path / "model" / "routing_head.safetensors")
    model, out = str(tmp_path / "model"), tmp_path / "dist" / "bundle"
    request = Request(NEOX, model, {"expert": model}, ("fp32",), ("ort:cpu",), out)
    with pytest.raises(
        FusionError, match=r"^The router \(.*model\) cannot be traced as a model of the family neox \(AttributeError: .*\.$"
    ):
        export(request, Stages(Console(quiet=True)))
    assert not list(out.parent.iterdir())
