"""PEFT LoRA adapters with random values, written by PEFT itself, and the models that PEFT makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fusionroute.fr_export.console.quiet import quiet
from tests.support.systems import Shape, make_model

SHAPE = Shape(heads=2, kv_heads=1, head_dim=16, hidden=32, layers=1, vocab=300, tokenizer=True)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base: Path, folder: Path, seed: int = 0, name: str = "default", **options: Any) -> Path:
    """Write an adapter of `base` whose values are all random: norms and biases that it trains too.

    `options` are those of peft.LoraConfig. An adapter of another name than default lies in folder/name.
    """
    torch.manual_seed(seed)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options))
        adapted = get_peft_model(model, config, name)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        adapted.save_pretrained(folder)
    return folder if name == "default" else folder / name


def peft_model(base: Path, adapter: Path) -> Any:
    """The adapted model as PEFT runs it, not merged, in fp32 with eager attention."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        return PeftModel.from_pretrained(model, adapter).eval()


def make_adapted_system(folder: Path, shape: Shape, options: list[dict[str, Any]]) -> tuple[Path, str, dict[str, str]]:
    """A base, a router adapter with a routing head, and one expert adapter for each but the first of the `options`.

    Returns the base, the router's folder and name → folder of the experts.
    """
    base = make_model(folder / "base", shape, 0, expert=False)
    router = make_adapter(base, folder / "router", 1, **options[0])
    head = torch.randn(len(options) - 1, shape.hidden, generator=torch.Generator().manual_seed(2))
    save_file({"routing_head.weight": head}, router / "routing_head.safetensors")
    experts = {f"expert{n}": make_adapter(base, folder / f"expert{n}", 3 + n, **each) for n, each in enumerate(options[1:])}
    return base, str(router), {name: str(expert) for name, expert in experts.items()}
