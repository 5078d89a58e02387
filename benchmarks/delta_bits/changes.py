"""What stands for an expert's change: factors of any rank, or blocks of 2 bits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from fusionroute.fr_export.graphs.factors import LOOKUP
from fusionroute.fr_export.precision import gptq
from fusionroute.fr_export.precision.approximation import Change, Spectrum, spectrum_of
from fusionroute.fr_export.precision.blockwise import Format, nearest, widened

CLIPS = (1.0, 0.9, 0.8, 0.7)


def coarse_grid(rows: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points of 2 bits, as `int4.grid` chooses them for 4."""
    low, high = np.minimum(rows.min(-1), 0), np.maximum(rows.max(-1), 0)
    best, scales, zeros = np.full(low.shape, np.inf), np.zeros(low.shape, np.float16), np.zeros(low.shape, np.uint8)
    for clip in CLIPS:
        scale = ((high - low) * np.float32(clip / 3)).astype(np.float16)
        step = np.maximum(scale.astype(np.float32), 1e-30)
        zero = np.clip(np.rint(-low * clip / step), 0, 3)
        levels = np.clip(np.rint(rows / step[..., None]) + zero[..., None], 0, 3)
        error = np.square((levels - zero[..., None]) * step[..., None] - rows)
        squared = error.sum(-1) if importance is None else np.einsum("rbk,bk->rb", error, importance)
        better = squared < best
        best[better], scales[better], zeros[better] = squared[better], scale[better], zero[better]
    return scales, zeros


BLOCKS = Format(2, 64, np.dtype(np.float16), True, coarse_grid)


@dataclass(frozen=True)
class Decomposed:
    """A change, with the left singular vectors of its weighted differences, and what ranks of it gain."""

    change: Change
    left: Mapping[str, torch.Tensor]
    spectrum: Spectrum

    @classmethod
    def of(cls, change: Change) -> "Decomposed":
        """One decomposition for all ranks."""
        spectrum = spectrum_of(change)
        left = {
            name: torch.linalg.svd(change.weighted(difference), full_matrices=False)[0] for name, difference in change.differences.items()
        }
        return cls(replace(change, root=None), left, spectrum)

    def approximated(self, ranks: Mapping[str, int]) -> Iterator[tuple[str, np.ndarray]]:
        """Factor name → Q + B·A, float32 [N, K]."""
        for name, difference in self.change.differences.items():
            left = self.left[name][:, : ranks[name]]
            yield name, (self.change.wholes[name] - difference + left @ (left.T @ difference)).numpy()


def rounded_change(change: Change) -> Iterator[tuple[str, np.ndarray]]:
    """Factor name → Q and the difference in blocks of 2 bits, by GPTQ where inputs are known, float32 [N, K]."""
    factor = None
    if change.root is not None and change.root.ndim == 2:
        inputs = gptq.Hessian(len(change.root))
        inputs.sum = change.root @ change.root.T
        factor = inputs.factor()
    for name, difference in change.differences.items():
        rows = (difference.T if name.endswith(LOOKUP) else difference).contiguous().numpy()
        part = nearest(rows, BLOCKS) if factor is None else gptq.quantise(rows, factor, BLOCKS)
        values = torch.from_numpy(widened(part, 2, rows.shape[1]))
        yield name, (change.wholes[name] - difference + (values.T if name.endswith(LOOKUP) else values)).numpy()
