"""Whether what models answer are finite numbers: read off values that are at hand anyway.

A NaN or an infinity in a row of logits makes its normaliser one, and a sum of routing scores keeps either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusionroute.runtime.backend import Fused
from fusionroute.runtime.backends.greedy_fusion import GreedyFused
from fusionroute.runtime.errors import FusionError, InputError, NumericalError
from fusionroute.runtime.logits_processor import Processed

MEND = "load another precision (fp32 and bf16 hold the largest numbers), or check the bundle's files with verify=True"


class Numerics:
    """The checks of one system, which name its models. names: of the router, then of the experts."""

    def __init__(self, names: Sequence[str], precision: str):
        self._names, self._precision = names, precision

    def check_routing(self, scores: Sequence[float], position: int) -> None:
        """Raise NumericalError unless the router's scores for each expert at a position are finite."""
        if not math.isfinite(sum(scores)):
            raise self.error(self._names[0], "routing scores", position)

    def check_routings(self, scores: np.ndarray, positions: np.ndarray) -> None:
        """`check_routing` of float32 [K, n_experts] at positions [K]."""
        if not np.isfinite(scores).all():
            for row, position in zip(scores, positions.tolist(), strict=True):
                self.check_routing(row.tolist(), position)

    def check_router_logit(self, logit: float, position: int) -> None:
        """Raise NumericalError unless the largest of the router's logits at a position is finite."""
        if not math.isfinite(logit):
            raise self.error(self._names[0], "logits", position)

    def check_fusions(self, fused: Fused, router: Any, expert: Any, number: int, positions: np.ndarray) -> None:
        """Raise `fault` for the first of the fused positions [K] whose logits [K, V] are not finite."""
        wrong = np.flatnonzero(~np.isfinite(fused.log_normaliser))
        if len(wrong):
            first = slice(int(wrong[0]), int(wrong[0]) + 1)
            raise self.fault(fused, router[first], expert[first], number, int(positions[first.start]), first.start)

    def fault(self, fused: Fused | Processed, router: Any, expert: Any, number: int, position: int, row: int = 0) -> FusionError:
        """Why a row of a fusion is not finite: logits [1, V] of the router (None: it did not run) and of an expert, its
        number, and their position.
        """
        if math.isfinite(fused.log_normaliser[row]):
            return InputError("A penalty, logit_bias or temperature takes the logits beyond what float32 holds: use a value nearer to 1.")
        names = self._names[0], self._names[1 + number]
        for name, logits in zip(names, (router, expert), strict=True):
            if logits is not None and not np.isfinite(np.asarray(logits, np.float32).max()):  # a token that is masked with −inf is no fault
                return self.error(name, "logits", position)
        return self.error(None, f"fused logits of {' and '.join(names)}", position)

    def error(self, model: str | None, what: str, position: int) -> NumericalError:
        """For `what` of a model (None: of several) at a position, counted from 0."""
        whose = what if model is None else f"{what} of {model}"
        return NumericalError(f"The {whose} in {self._precision} hold NaN or infinity at position {position}: {MEND}.", model)


def is_finite(fused: Fused | GreedyFused | Processed) -> bool:
    """Whether the fused logits at one position are, before the penalty and the temperature and behind them."""
    if isinstance(fused, GreedyFused):
        return fused.finite
    return math.isfinite(fused.log_normaliser[0]) and math.isfinite(fused.sampling_normaliser[0])
