"""A router with its routing head and its frozen experts in plain torch, and the accuracy of both alone and fused."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fr_export.training.domains import DOMAINS
from fr_export.training.losses import IGNORE
from fr_export.training.rows import Batch

HEAD_FILE = "routing_head.safetensors"
HEAD_KEY = "routing_head.weight"
FUSION_WEIGHT = 0.5  # λ of the fused logits, the router's share


@dataclass
class System:
    """The four models of a family and the routing head, float32 [N, hidden]."""

    router: Any
    experts: list[Any]
    head: Tensor

    @classmethod
    def load(cls, folder: Path) -> "System":
        """Read a family's folder as the recipe writes it, computing in float32."""

        def model(path: Path) -> Any:
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()

        return cls(
            router=model(folder / "router"),
            experts=[model(folder / "experts" / name) for name in DOMAINS],
            head=load_file(folder / "router" / HEAD_FILE)[HEAD_KEY],
        )

    def route(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The router's logits [B, S, V] and routing scores [B, S, N] for `ids` [B, S]."""
        # The last of the hidden states is the one after the final norm.
        out = self.router(ids, use_cache=False, output_hidden_states=True)
        return out.logits, out.hidden_states[-1].float() @ self.head.T


@dataclass(frozen=True)
class Measurement:
    """Shares over the samples of one domain."""

    accuracy: dict[str, float]  # exact match of "math", "code", "instruction" (the experts), "router", "fused"
    routing: list[float]  # share of the answer tokens that goes to each expert


def measure(system: System, batch: Batch) -> Measurement:
    """Exact match under greedy decoding, of every model alone and of the fused system.

    One teacher-forced pass is enough: greedy decoding yields the whole answer and its end token if and only if each of
    them is the argmax after the right ones before it.
    """
    answer = batch.labels != IGNORE

    def exact(logits: Tensor) -> float:
        return float(((logits.argmax(-1) == batch.labels) | ~answer).all(dim=-1).float().mean())

    with torch.no_grad():
        router_logits, routing = system.route(batch.ids)
        logits = torch.stack([expert(batch.ids, use_cache=False).logits for expert in system.experts])
        choice = routing.argmax(dim=-1)
        chosen = logits.gather(0, choice[None, ..., None].expand(1, *logits.shape[1:]))[0]
        fused = FUSION_WEIGHT * router_logits + (1 - FUSION_WEIGHT) * chosen
    accuracy = {name: exact(own) for name, own in zip(DOMAINS, logits, strict=True)}
    accuracy |= {"router": exact(router_logits), "fused": exact(fused)}
    shares = torch.bincount(choice[answer], minlength=len(DOMAINS)) / answer.sum()
    return Measurement(accuracy, shares.tolist())


def mean_accuracy(measurements: Sequence[Measurement]) -> dict[str, float]:
    """The average over domains of each column."""
    return {k: sum(m.accuracy[k] for m in measurements) / len(measurements) for k in measurements[0].accuracy}
