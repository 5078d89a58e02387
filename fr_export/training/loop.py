"""The training loop: Muon for the matrices, AdamW for the rest, a warm-up and a cosine to zero, a progress bar."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fr_export.training.muon import Muon
from fr_export.training.rows import Batch

_WARM_UP = 0.05
_TABLES = ("embed_tokens", "lm_head")  # matrices whose rows are tokens, not directions: AdamW suits them


def train(
    title: str,
    model: Any,
    lr: float,
    loss_of: Callable[[Batch], Tensor],
    data: Iterator[Batch],
    steps: int,
    extra: Sequence[dict[str, Any]] = (),
) -> None:
    """Minimise `loss_of` over the model's parameters; `extra` are further AdamW groups with their own `lr`."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in model.named_parameters():
        (matrices if p.ndim == 2 and not any(t in name for t in _TABLES) else rest).append(p)
    groups = [{"params": rest, "lr": lr}, *extra]
    optimizers = (Muon(matrices, lr=lr), torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01))
    schedules = [torch.optim.lr_scheduler.LambdaLR(own, lambda step: _rate(step, steps)) for own in optimizers]
    parameters = [p for own in optimizers for group in own.param_groups for p in group["params"]]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task(title, total=steps)
        smooth = None
        for _ in range(steps):
            loss = loss_of(next(data))
            for own in optimizers:
                own.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for own in (*optimizers, *schedules):
                own.step()
            smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
            progress.update(task, advance=1, description=f"{title} · loss {smooth:.3f}")


def _rate(step: int, steps: int) -> float:
    warm = max(1, round(steps * _WARM_UP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
