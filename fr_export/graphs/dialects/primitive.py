"""Attention in primitive operators, for readers that have none of their own or whose own takes no softcap."""

from collections.abc import Sequence

import torch
from torch import Tensor

MASKED = -1e30  # in scores, which are always fp32


def attend(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor, scaling: float, softcap: float | None
) -> Tensor:  # fmt: skip
    """query [B, H, S, D] → [B, H, S, D]; scores are c·tanh(score / c) where they are capped.

    Keys and values stand in one or several parts [B, KV, T, D] each, which are read where they are; the bool mask says
    which of all their positions a query sees and is broadcast to [B, KV, H / KV, S, ΣT]. The queries of one key head
    are read together.
    """
    batch, heads, length, size = query.shape
    kv_heads = keys[0].shape[1]
    group = heads // kv_heads
    # the cap's division goes into the queries, so that scores are wide from the product on
    together = (query * (scaling / softcap if softcap else scaling)).reshape(batch, kv_heads, group * length, size)
    scores = joined([together @ part.transpose(2, 3) for part in keys])
    if softcap:
        scores = torch.tanh(scores) * softcap
    scores = scores.reshape(batch, kv_heads, group, length, scores.shape[-1]).masked_fill(~mask, MASKED)
    shares = torch.softmax(scores, -1).reshape(batch, kv_heads, group * length, scores.shape[-1])
    start, out = 0, None
    for part in values:
        end = start + part.shape[2]
        read = (shares if len(values) == 1 else shares[..., start:end]) @ part
        out, start = read if out is None else out + read, end
    assert out is not None
    return out.reshape(batch, heads, length, size)


def joined(parts: list[Tensor]) -> Tensor:
    """Along the last axis."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
