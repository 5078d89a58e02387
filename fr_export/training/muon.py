"""Muon: momentum whose matrix updates are orthogonalised. It needs about half the steps of AdamW on these models."""

from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration (Jordan et al., 2024)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values of [K, M, N] all pushed towards 1."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices only. In float32: PyTorch's own works in bfloat16, which is very slow on a CPU."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def step(self, closure: None = None) -> None:
        """One update; matrices of one shape are orthogonalised together."""
        with torch.no_grad():
            for group in self.param_groups:
                shapes: dict[Any, list[Tensor]] = {}
                for p in group["params"]:
                    if p.grad is not None:
                        shapes.setdefault(p.shape, []).append(p)
                for same in shapes.values():
                    self._update(same, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        directions = []
        for p in parameters:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(momentum, group["momentum"]))
        # Scaled so that an element moves about as far as under AdamW, hence the same learning rates fit.
        scale = 0.2 * max(parameters[0].shape) ** 0.5
        for p, update in zip(parameters, orthogonalise(torch.stack(directions)), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)
