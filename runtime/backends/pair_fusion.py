"""Fusion of models that share a head: it runs once, on the fused hidden states."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusionroute.runtime.backend import Fused, Fuser, FusionInputs
from fusionroute.runtime.backends.cpu_fusion import OrtFuser
from fusionroute.runtime.backends.hidden_rows import BoundHead, Head, HiddenRows


class PairFuser(Fuser):
    """Makes logits of HiddenRows, then fuses as OrtFuser does.

    A linear head W has a·W·h_router + b·W·h_expert = W·(a·h_router + b·h_expert): it reads its weights for one row
    instead of two. A head that caps its logits runs on the rows of both.
    """

    def __init__(self, fuser: OrtFuser, head: Head, linear: bool, exact: bool):
        """`exact`: the head takes rows by twos, see `EvenCache`."""
        self._fuser, self._linear, self._exact = fuser, linear, exact
        self._single, self._several = BoundHead(head), BoundHead(head)

    def __call__(self, inputs: FusionInputs) -> Fused:
        """See `runtime.backend.Fuser`."""
        router, expert, coefficients = self._logits(self._single, inputs.router, inputs.expert, inputs.coefficients)
        return self._fuser(inputs._replace(router=router, expert=expert, coefficients=coefficients))

    def row(self, fused: Fused) -> np.ndarray:
        """See `runtime.backend.Fuser`."""
        return self._fuser.row(fused)

    def ahead(self, router: Any, expert: Any, coefficients: tuple[float, float]) -> tuple[Any, Any, tuple[float, float]]:
        """See `runtime.backend.Fuser`: one run of the head for all rows."""
        return self._logits(self._several, router, expert, coefficients)

    def logits(self, rows: Any) -> np.ndarray:
        """See `runtime.backend.Fuser`."""
        if not isinstance(rows, HiddenRows):
            return np.asarray(rows)
        bound, count = self._single if len(rows) == 1 else self._several, len(rows)
        self._states(bound, count)[:] = rows.states
        return bound.logits()[:count]

    def _logits(
        self, bound: BoundHead, router: Any, expert: Any, coefficients: tuple[float, float]
    ) -> tuple[Any, Any, tuple[float, float]]:
        """The same fusion of logits float32 [K, V], which are those of fused states where the head allows it."""
        if not isinstance(router, HiddenRows):
            return router, expert, coefficients  # made ahead
        a, b = coefficients
        count = len(router)
        if not isinstance(expert, HiddenRows):  # of an expert apart
            self._states(bound, count)[:] = router.states
            return bound.logits()[:count], expert, coefficients
        if self._linear or not a or not b:
            states = self._states(bound, count)
            np.multiply(router.states, a, out=states)
            states += b * expert.states
            logits = bound.logits()[:count]
            return logits, logits, (0.0, 1.0)
        np.concatenate((router.states, expert.states), out=self._states(bound, 2 * count))
        logits = bound.logits()
        return logits[:count], logits[count : 2 * count], coefficients

    def _states(self, bound: BoundHead, count: int) -> np.ndarray:
        """Where the states of so many rows are to be written."""
        padding = count % 2 if self._exact else 0
        states = bound.states(count + padding)
        states[count:] = 0
        return states[:count]
