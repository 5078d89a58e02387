"""The reference for exported systems: plain torch in fp32 that reads full prefixes without a cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.checkpoints.torch_model import torch_model


@dataclass(frozen=True)
class Reference:
    """One sequence. logits float32 [S, V] fused, routing float32 [S, n_experts], experts int64 [S]."""

    logits: np.ndarray
    routing: np.ndarray
    experts: np.ndarray


def load(checkpoint: Checkpoint) -> Any:
    """The checkpoint as transformers runs it, in fp32 with eager attention: the only one that implements softcaps."""
    return torch_model(checkpoint)


@torch.no_grad()
def reference(
    system: System,
    sequences: Sequence[Sequence[int]],
    coefficients: tuple[float, float],
    advance: Callable[[float], None] = lambda _: None,
) -> list[Reference]:
    """Fused logits at every position of every sequence. One model is in memory at a time.

    `coefficients` weight the router's logits and the expert's.
    """
    inputs = [torch.tensor([list(ids)]) for ids in sequences]
    router = load(system.router)
    head, bias = torch.from_numpy(system.head.weight), torch.from_numpy(system.head.bias)
    results = []
    for ids in inputs:
        output = router(input_ids=ids, use_cache=False, output_hidden_states=True)  # the last of these is behind the norm
        logits = output.logits[0, :, : system.vocab_size].numpy()
        routing = (output.hidden_states[-1][0] @ head.T + bias).numpy()
        results.append(Reference(coefficients[0] * logits, routing, routing.argmax(-1)))
    del router
    advance(1)
    for number, expert in enumerate(system.experts):
        model = load(expert)
        for ids, result in zip(inputs, results, strict=True):
            mine = np.flatnonzero(result.experts == number)
            if len(mine):
                logits = model(input_ids=ids, use_cache=False).logits[0, mine, : system.vocab_size].numpy()
                result.logits[mine] += coefficients[1] * logits
        del model
        advance(1)
    return results
