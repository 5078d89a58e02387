"""GPTQ: round a matrix one input channel at a time, and let the channels still to come make up for each rounding error.

Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, with two additions of its authors' code: channels in the
order of falling importance, and the ranges of all blocks fixed before the first channel is rounded, so that blocks stay
as the operators read them. Written by hand: libraries hold a whole model in torch and know neither these blocks nor
weights that are read in slices.
"""

from dataclasses import dataclass

import numpy as np
import torch

from fusionroute.fr_export.precision.blockwise import Format, Quantised, blocked

DAMPING = 0.01  # of the mean importance, added to every channel's
TOGETHER = 128  # channels whose errors reach the ones behind them in one product


class Hessian:
    """Σ x·xᵀ float32 [K, K] of the inputs of a product: half the second derivative of its squared error by a row of
    weights.
    """

    def __init__(self, channels: int):
        self.sum = torch.zeros(channels, channels)

    def see(self, inputs: np.ndarray) -> None:
        """Add float32 [S, K]."""
        x = torch.from_numpy(np.ascontiguousarray(inputs))
        self.sum.addmm_(x.T, x)

    def factor(self) -> "Factor":
        """What `quantise` needs. The sum is given up to it. Channels that were always zero round to nearest."""
        importance = self.sum.diagonal().clone()
        dead = importance == 0
        importance[dead] = 1.0 if dead.all() else importance[~dead].min()
        order = torch.argsort(importance, descending=True, stable=True)
        total = self.sum[order][:, order]
        damping = DAMPING
        while True:
            damped = total.flip(0, 1)
            damped.diagonal().copy_((importance[order] + damping * importance.mean()).flip(0))
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                break
            damping *= 10  # too few inputs, or too alike, for single precision
        del total, damped
        # J·L⁻¹·J is the upper factor of the inverse, where L is the lower one of the Hessian in reverse order, J·H·J
        identity = torch.eye(len(order))
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False, out=identity).flip(0, 1)
        return Factor(order, inverse, importance.numpy())


@dataclass(frozen=True)
class Factor:
    """A Hessian made ready.

    order int64 [K]: the channels by falling importance. inverse float32 [K, K]: the upper Cholesky factor of the
    inverse of the damped Hessian, in that order. importance float32 [K]: the Hessian's diagonal, in the matrix's own
    order.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    importance: np.ndarray

    @property
    def channels(self) -> int:
        """K."""
        return len(self.importance)


@torch.no_grad()
def quantise(rows: np.ndarray, factor: Factor, fmt: Format) -> Quantised:
    """Round fp32 rows [R, K] so that Σ ((W − Ŵ)·x)² over the inputs of the Hessian becomes small. Rows do not depend on
    each other.
    """
    count, width = rows.shape
    padded = blocked(rows, fmt.block)
    scales, zeros = fmt.grid(padded, blocked(factor.importance[None], fmt.block)[0])
    step = torch.from_numpy(scales.astype(np.float32).T.copy())  # [blocks, R]
    inverse = torch.where(step > 0, 1 / step, 0.0)
    top = 2**fmt.bits - 1
    middle = np.full(scales.shape, 1 << (fmt.bits - 1), np.uint8) if zeros is None else zeros
    zero = torch.from_numpy(middle.T.astype(np.float32))
    # [K, R]: a channel is a row, what is still to be rounded
    left = torch.from_numpy(rows).T[factor.order].contiguous()
    levels = torch.empty(padded.shape[1] * fmt.block, count, dtype=torch.uint8)
    levels.view(padded.shape[1], fmt.block, count).copy_(torch.from_numpy(middle.T.copy())[:, None])
    for begin in range(0, width, TOGETHER):
        end = min(begin + TOGETHER, width)
        errors = torch.empty(end - begin, count)
        for at in range(begin, end):
            channel = int(factor.order[at])
            block = channel // fmt.block
            level = (left[at] * inverse[block]).round_().add_(zero[block]).clamp_(0, top)
            levels[channel] = level.to(torch.uint8)
            error = (left[at] - (level - zero[block]) * step[block]) / factor.inverse[at, at]
            errors[at - begin] = error
            left[at + 1 : end].addr_(factor.inverse[at, at + 1 : end], error, alpha=-1)
        left[end:].addmm_(factor.inverse[begin:end, end:].T, errors, alpha=-1)
    return Quantised(levels.T.contiguous().numpy().reshape(padded.shape), scales, zeros)
