"""Models in plain torch whose keys and values are rounded as a bundle's graphs round them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.verify.torch_reference import load

Steps = Mapping[str, np.ndarray]  # cache, such as present.0.key → its steps [1, KV, 1, D]


def steps_of(graph: Path) -> Steps:
    """The steps in a graph."""
    values = ir.load(graph).graph.initializers
    return {name.removesuffix(".scale"): value.const_value.numpy() for name, value in values.items() if name.endswith(".scale")}


@contextmanager
def rounded(model: Any, steps: Steps, bits: int) -> Iterator[None]:
    """Round keys, behind their rotary embedding, and values of a torch model with eager attention."""
    module = sys.modules[type(model).__module__]
    eager, largest = module.eager_attention_forward, 2 ** (bits - 1) - 1

    def snapped(x: torch.Tensor, name: str) -> torch.Tensor:
        step = torch.from_numpy(steps[name].copy())[..., : x.shape[-1]]
        return (x / step).round().clamp(-largest - 1, largest) * step

    def attention(own: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any) -> Any:
        layer = own.layer_idx
        return eager(own, query, snapped(key, f"present.{layer}.key"), snapped(value, f"present.{layer}.value"), *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", attention)
        yield


@torch.no_grad()
def keys_and_values(model: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What each cache of a torch model with eager attention would hold of a text: name → [S, KV·D]."""
    module = sys.modules[type(model).__module__]
    eager, held = module.eager_attention_forward, {}

    def attention(own: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any) -> Any:
        for kind, x in (("key", key), ("value", value)):
            held[f"present.{own.layer_idx}.{kind}"] = x[0].transpose(0, 1).flatten(1).numpy().copy()
        return eager(own, query, key, value, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", attention)
        model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False)
    return held


@torch.no_grad()
def fused(system: System, graphs: Sequence[Path], bits: int, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Fused logits [S, V] at λ = 0.5 and routing [S, n] of models whose graphs are these, the router's first."""
    text, models = torch.tensor([ids]), [load(each) for each in system.models]
    logits = []
    for model, graph in zip(models, graphs, strict=True):
        with rounded(model, steps_of(graph), bits):
            output = model(input_ids=text, use_cache=False, output_hidden_states=True)
        logits.append(output.logits[0, :, : system.vocab_size].numpy())
        if model is models[0]:
            routing = output.hidden_states[-1][0].numpy() @ system.head.weight.T + system.head.bias
    chosen = np.stack(logits[1:])[routing.argmax(-1), np.arange(len(ids))]
    return 0.5 * logits[0] + 0.5 * chosen, routing
