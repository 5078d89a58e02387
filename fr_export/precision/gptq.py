"""GPTQ: round a matrix one input channel at a time, and let the channels still to come make up for each rounding error.

Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, with two additions of its authors' code: channels in the
order of falling importance, and the ranges of all blocks fixed before the first channel is rounded, so that blocks stay
as the operators read them. In the form of Chee, Cai, Kuleshov, De Sa 2023, arXiv:2307.13304 (LDLQ), which takes a factor
of the Hessian itself and gives the same result without an inverse. Written by hand: libraries hold a whole
model in torch and know neither these blocks nor weights that are read in slices.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from fusionroute.fr_export.precision.blockwise import Format, Quantised, blocked
from fusionroute.fr_export.precision.kernels import round_channels
from fusionroute.runtime.machine import cores

DAMPING = 0.01  # of the mean importance, added to every channel's
TOGETHER = 128  # channels whose errors reach the ones behind them in one product
TILE = 1536  # rows rounded at a time, at most: twice as many take a tenth less time, but leave cores idle
PART = 384  # channels: the sum is symmetric, and what lies left of a part is known from above it


class Hessian:
    """Σ x·xᵀ float32 [K, K] of the inputs of a product: half the second derivative of its squared error by a row of
    weights.
    """

    def __init__(self, channels: int):
        self.sum = torch.zeros(channels, channels)

    def see(self, inputs: np.ndarray) -> None:
        """Add float32 [S, K]."""
        x = torch.from_numpy(np.ascontiguousarray(inputs))
        for start in range(0, x.shape[1], PART):
            self.sum[start : start + PART, start:].addmm_(x[:, start : start + PART].T, x[:, start:])

    def _mirror(self) -> None:
        """Fill in what lies left of the parts."""
        for start in range(PART, len(self.sum), PART):
            self.sum[start:, start - PART : start] = self.sum[start - PART : start, start:].T

    def root(self) -> torch.Tensor:
        """The lower Cholesky factor float32 [K, K] of the sum, damped. The sum is given up to it."""
        self._mirror()
        importance = self.sum.diagonal().clone()
        damping = DAMPING * (float(importance.mean()) or 1.0)
        while True:
            self.sum.diagonal().copy_(importance + damping)
            lower, failed = torch.linalg.cholesky_ex(self.sum)
            if not failed:
                return lower
            damping *= 10

    def factor(self) -> "Factor":
        """What `quantise` needs. The sum is given up to it. Channels that were always zero round to nearest."""
        self._mirror()
        importance = self.sum.diagonal().clone()
        dead = importance == 0
        importance[dead] = 1.0 if dead.all() else importance[~dead].min()
        order = torch.argsort(importance, descending=True, stable=True)
        reverse = order.flip(0)
        total = self.sum.index_select(0, reverse).index_select(1, reverse)
        damping = DAMPING
        while True:
            total.diagonal().copy_(importance[reverse] + damping * importance.mean())
            lower, failed = torch.linalg.cholesky_ex(total)
            if not failed:
                break
            damping *= 10  # too few inputs, or too alike, for single precision
        del total
        shares = lower.flip(0, 1)  # J·L·J is upper where L is the lower factor of the Hessian in reverse order, J·H·J
        shares /= shares.diagonal().clone()
        return Factor(order, shares.contiguous(), importance.numpy())


@dataclass(frozen=True)
class Factor:
    """A Hessian made ready.

    order int64 [K]: the channels by falling importance. shares float32 [K, K], in that order: how much of a channel's
    error each one behind it takes over, the upper Cholesky factor of the damped Hessian with its columns divided by their
    diagonal. importance float32 [K]: the Hessian's diagonal, in the matrix's own order.
    """

    order: torch.Tensor
    shares: torch.Tensor
    importance: np.ndarray

    @property
    def channels(self) -> int:
        """K."""
        return len(self.importance)


def quantise(rows: np.ndarray, factor: Factor, fmt: Format, threads: int | None = None) -> Quantised:
    """Round fp32 rows [R, K] so that Σ ((W − Ŵ)·x)² over the inputs of the Hessian becomes small. Rows do not depend on
    each other: they are rounded in tiles of equal size, by so many threads (None: one per core).
    """
    tiles = np.array_split(rows, -(-len(rows) // TILE))
    threads = min(threads or cores(), len(tiles))
    rounded = partial(quantise_tile, factor=factor, fmt=fmt)
    if threads == 1:
        values, scales, zeros = zip(*map(rounded, tiles), strict=True)
    else:
        # one core per tile: torch would start as many threads as there are cores for each of them
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            values, scales, zeros = zip(*pool.map(rounded, tiles), strict=True)
    return Quantised(np.concatenate(values), np.concatenate(scales), np.concatenate(zeros) if fmt.zeros else None)


@torch.no_grad()
def quantise_tile(rows: np.ndarray, factor: Factor, fmt: Format) -> Quantised:
    """`quantise` for a few rows, on one core.

    A channel's error reaches the rest of its TOGETHER channels in `round_channels`, and all others in one product per
    TOGETHER: most of the work is products of matrices.
    """
    count, width = rows.shape
    padded = blocked(rows, fmt.block)
    scales, zeros = fmt.grid(padded, blocked(factor.importance[None], fmt.block)[0])
    middle = np.full(scales.shape, fmt.middle, np.uint8) if zeros is None else zeros
    steps, zero = (np.ascontiguousarray(each.T, np.float32) for each in (scales, middle))  # [blocks, R]
    # [K, R]: a channel is a row. torch transposes and gathers several times faster than numpy
    weights = torch.from_numpy(rows).T.contiguous().index_select(0, factor.order)
    values, errors = weights.clone(), torch.empty(TOGETHER, count)  # values: with what makes up for errors
    rounded = np.empty((TOGETHER, count), np.uint8)
    order, shares = factor.order.numpy(), factor.shares.numpy()
    block = order // fmt.block
    levels = np.empty((padded.shape[1] * fmt.block, count), np.uint8)
    levels.reshape(padded.shape[1], fmt.block, count)[:] = middle.T[:, None]
    for begin in range(0, width, TOGETHER):
        end = min(begin + TOGETHER, width)
        done = end - begin
        round_channels(
            weights[begin:end].numpy(), values[begin:end].numpy(), shares[begin:end, begin:end], block[begin:end], steps, zero,
            2**fmt.bits - 1, errors[:done].numpy(), rounded[:done],
        )  # fmt: skip
        levels[order[begin:end]] = rounded[:done]
        values[end:].addmm_(factor.shares[begin:end, end:].T, errors[:done])
    return Quantised(torch.from_numpy(levels).T.contiguous().numpy().reshape(padded.shape), scales, zeros)
