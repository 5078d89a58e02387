"""FusionRoute systems of any shape with random weights: real Hugging Face folders, written in a second."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fusionroute.fr_export.families import FAMILIES

SHIPPED = [family.name for family in FAMILIES.values() if family.ships_tiny]
# family → its config, and fields that let small systems show what is special about it
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma2": (transformers.Gemma2Config, {"query_pre_attn_scalar": 40, "sliding_window": 16}),
    "gemma3": (transformers.Gemma3TextConfig, {"query_pre_attn_scalar": 40, "sliding_window": 16, "sliding_window_pattern": 2}),
    "llama3": (transformers.LlamaConfig, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 16}),
    "olmo2": (transformers.Olmo2Config, {}),
    "phi3": (
        transformers.Phi3Config,
        {"sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "qwen2": (transformers.Qwen2Config, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": (transformers.Qwen3Config, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "smollm3": (transformers.SmolLM3Config, {"no_rope_layer_interval": 2}),
}


@dataclass(frozen=True)
class Shape:
    """The shape of a system.

    `config` overrides any field of the Hugging Face config, `expert_config` those of the experts; with an
    `expert_family`, experts are of that family and take `expert_config` alone. `head_dim` holds for families whose
    config has one; for the others it is hidden / heads.
    """

    family: str = "llama3"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 64
    vocab: int = 300
    experts: int = 3
    layers: int = 2
    dtype: torch.dtype = torch.float32
    config: dict[str, Any] = field(default_factory=dict)
    expert_config: dict[str, Any] = field(default_factory=dict)
    tokenizer: bool = False
    shard_size: str = "1GB"
    expert_family: str | None = None

    @property
    def head_size(self) -> int:
        """Of the router's attention heads."""
        return self.head_dim if hasattr(CONFIGS[self.family][0](), "head_dim") else self.hidden // self.heads

    def build(self, expert: bool) -> Any:
        """The Hugging Face config of the router or of an expert."""
        fields: dict[str, Any] = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 1024,
            "initializer_range": 0.15,  # wide enough that logits differ by much more than rounding
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        other = self.expert_family if expert else None
        kind, own = CONFIGS[other or self.family]
        general = {name: value for name, value in fields.items() if hasattr(kind(), name)}
        return kind(**(general | own | (self.config if other is None else {}) | (self.expert_config if expert else {})))


def make_system(folder: Path, shape: Shape, seed: int = 0) -> tuple[str, dict[str, str]]:
    """Write the checkpoints; returns the router's folder and name → folder of the experts."""
    router = make_model(folder / "router", shape, seed, expert=False)
    head = torch.randn(shape.experts, shape.hidden, generator=torch.Generator().manual_seed(seed))
    save_file({"routing_head.weight": head, "routing_head.bias": torch.zeros(shape.experts)}, router / "routing_head.safetensors")
    names = [f"expert{number}" for number in range(shape.experts)]
    return str(router), {name: str(make_model(folder / name, shape, seed + 1 + n, expert=True)) for n, name in enumerate(names)}


def make_model(folder: Path, shape: Shape, seed: int, expert: bool) -> Path:
    """Write one checkpoint with seeded random weights, norms too: a forgotten offset must show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(shape.build(expert), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        if name.endswith("embed_tokens.weight"):
            parameter.data = torch.randn_like(parameter) * 0.5  # transformers leaves the padding row at zero
    model.to(shape.dtype).save_pretrained(folder, max_shard_size=shape.shard_size)
    if shape.tokenizer:
        write_tokenizer(folder, shape.vocab)
    return folder


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level tokenizer with BOS, of at least 259 tokens, padded with made-up words up to `vocab`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<bos>", "<eos>", *alphabet]
    words += [f"<unused{number}>" for number in range(vocab - len(words))]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words[:vocab])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
