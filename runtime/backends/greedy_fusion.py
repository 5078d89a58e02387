"""Fusion for one candidate, in numpy: three times as fast as the fusion graph, which also sorts and copies rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fusionroute.runtime.backend import Fused


class GreedyFuser:
    """The likeliest token of L = a·L_router + b·L_expert, float32 [1, V] each.

    The next call overwrites the buffers that it returns.
    """

    def __init__(self, vocab: int):
        self._rows = np.empty((1, vocab), np.float32)
        self._scratch = np.empty((1, vocab), np.float32)
        self._id, self._logit = np.empty((1, 1), np.int64), np.empty((1, 1), np.float32)
        self._normaliser, self._sampling = np.empty(1, np.float32), np.empty(1, np.float32)

    def __call__(self, router: Any, expert: Any, coefficients: tuple[float, float], temperature: float) -> Fused:
        """See `runtime.backend.Fuser`; there is no penalty. Of equal logits the lower id wins."""
        rows, scratch = self._rows, self._scratch
        a, b = coefficients
        first, weight = (expert, b) if b else (router, a)  # 0 · inf is NaN
        np.multiply(first, np.float32(weight), out=rows)
        if a and b:
            np.multiply(router, np.float32(a), out=scratch)
            rows += scratch
        best = int(rows.argmax())
        peak = rows[0, best]
        self._id[0, 0], self._logit[0, 0] = best, peak
        self._normaliser[0] = self._log_sum(peak, 1.0)
        self._sampling[0] = self._normaliser[0] if temperature == 1.0 else self._log_sum(peak, temperature)
        return Fused(self._id, self._logit, self._logit, self._normaliser, self._sampling, rows)

    def _log_sum(self, peak: np.float32, temperature: float) -> float:
        """logsumexp of the rows / temperature; NaN where a logit is NaN or inf. NumPy's pairwise sum keeps small terms."""
        if not math.isfinite(peak):
            return math.nan
        scratch = self._scratch
        np.subtract(self._rows, peak, out=scratch)
        if temperature != 1.0:
            scratch /= np.float32(temperature)
        np.exp(scratch, out=scratch)
        return float(peak) / temperature + math.log(scratch.sum())

    def hand_over(self) -> None:
        """Leave the rows of the last fusion to the caller; the next call writes into new ones."""
        self._rows = np.empty_like(self._rows)
