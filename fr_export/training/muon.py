"""Muon: momentum with orthogonalised matrix updates. On small models it needs about half the steps of AdamW."""

from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration (Jordan et al., 2024)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices of [K, M, N]: all singular values are pushed towards 1."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """Muon for parameter groups of matrices; AdamW for those with `"muon": False`.

    In float32: PyTorch's own Muon works in bfloat16, which is very slow on a CPU.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.01, momentum: float = 0.95, **adamw: Any) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, **adamw)
        for group in self.param_groups:
            group.setdefault("muon", True)
            group["momentum"] = momentum

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW's own method updates checkpoints of older versions, and fails on parameters that have momentum but no
        # "step".
        torch.optim.Optimizer.__setstate__(self, state)

    def step(self, closure: None = None) -> None:
        """One update; matrices of one shape are orthogonalised together."""
        groups = self.param_groups
        with torch.no_grad():
            for group in groups:
                if group["muon"]:
                    shapes: dict[Any, list[Tensor]] = {}
                    for p in group["params"]:
                        if p.grad is not None:
                            shapes.setdefault(p.shape, []).append(p)
                    for same in shapes.values():
                        self._update(same, group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        directions = []
        for p in parameters:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(momentum, group["momentum"]))
        # Scaled so that an element moves about as far as under AdamW: the same learning rates fit.
        scale = 0.2 * max(parameters[0].shape) ** 0.5
        for p, update in zip(parameters, orthogonalise(torch.stack(directions)), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)
