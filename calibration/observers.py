"""Statistics of the activations that enter a weight matrix, gathered piece by piece in constant memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fusionroute.runtime.errors import InputError

BINS = 2048
LEVELS = 127  # positive steps of symmetric 8 bit
SMALLEST = -100  # exponent of the smallest histogram: below it float32 cannot hold the scale

Floats = npt.NDArray[np.float32]


class Observer:
    """Statistics of one matrix's input, K channels wide.

    How the rows are cut into pieces changes nothing but rounding in the sums. channel_absmax float32 [K]; channel_sum
    float64 [K], of squares; counts int64 [BINS]: a histogram of |x| over [0, limit), where `limit` is the smallest
    power of two above every |x|. It doubles when a larger value comes: neighbouring bins are merged, exactly. Without
    any rows (an expert that was never chosen) all ranges are 0.
    """

    def __init__(self, matrix: str, channels: int):
        self.matrix = matrix
        self.rows = 0
        self.minimum, self.maximum = math.inf, -math.inf
        self.channel_absmax = np.zeros(channels, np.float32)
        self.channel_sum = np.zeros(channels, np.float64)
        self.counts = np.zeros(BINS, np.int64)
        self.exponent = SMALLEST

    @property
    def limit(self) -> float:
        """Where the histogram ends."""
        return 2.0**self.exponent

    @property
    def mean_square(self) -> npt.NDArray[np.float64]:
        """Mean of x² by channel, float64 [K]; zeros before the first row."""
        return self.channel_sum / max(self.rows, 1)

    def see(self, activations: Floats) -> None:
        """Add activations float32 [..., K]. Raises InputError where a value is not finite; nothing is added then."""
        rows = np.ascontiguousarray(activations.reshape(-1, len(self.channel_absmax)), np.float32)
        if len(rows):
            self._add(rows)

    def _add(self, rows: Floats) -> None:
        from fusionroute.calibration.kernels import add_moments, count_magnitudes  # late: reading statistics takes no compiler

        lowest, highest, squares = rows[0].copy(), rows[0].copy(), np.zeros(rows.shape[1])
        add_moments(rows, lowest, highest, squares)
        if not np.isfinite(squares).all():
            raise InputError(
                f"The activations that enter {self.matrix} are not all finite: expected numbers; check the model's weights, "
                "or run it in fp32 or bf16 where fp16 overflows."
            )
        low, high = float(lowest.min()), float(highest.max())
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        np.maximum(self.channel_absmax, np.maximum(highest, -lowest), out=self.channel_absmax)
        self._widen(max(-low, high))
        self.rows += len(rows)
        self.channel_sum += squares
        count_magnitudes(rows.ravel(), BINS / self.limit, self.counts)  # a power of two like `limit`: the products are exact

    def add(self, other: Observer) -> None:
        """Add what another observer of as many channels has seen."""
        other = Observer.of(other.matrix, other.tensors())  # a copy: its histogram may be widened
        self._widen(other.limit / 2)  # the smallest value that needs the other's histogram
        other._widen(self.limit / 2)
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.rows += other.rows
        np.maximum(self.channel_absmax, other.channel_absmax, out=self.channel_absmax)
        self.channel_sum += other.channel_sum
        self.counts += other.counts

    def _widen(self, value: float) -> None:
        """Widen the histogram until it holds `value`."""
        exponent = math.frexp(value)[1] if value else SMALLEST  # value < 2**exponent
        while self.exponent < exponent:
            if not self.counts[1:].any():  # all values are in the first bin, however wide it is
                self.exponent = exponent
                return
            self.counts[: BINS // 2] = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[BINS // 2 :] = 0
            self.exponent += 1

    # -- on disk ------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """All statistics as arrays.

        numbers float64 [rows, minimum, maximum, exponent], absmax float32 [K], squares float64 [K], counts unsigned, up
        to the last bin that is not empty.
        """
        counts = self.counts[: self._used()]
        return {
            "numbers": np.array([self.rows, self.minimum, self.maximum, self.exponent], np.float64),
            "absmax": self.channel_absmax,
            "squares": self.channel_sum,
            "counts": counts.astype(np.uint32) if counts.max(initial=0) < 1 << 32 else counts,
        }

    @classmethod
    def of(cls, matrix: str, tensors: Mapping[str, npt.NDArray[Any]]) -> Observer:
        """The observer whose statistics are `tensors`. Raises InputError where they contradict each other."""
        mismatch = InputError(
            f"The statistics of {matrix} do not fit together: expected what an observer of this version gathers; make them again."
        )
        try:
            rows, minimum, maximum, exponent = tensors["numbers"].tolist()
            absmax, squares, counts = (tensors[name] for name in ("absmax", "squares", "counts"))
        except (KeyError, ValueError) as error:
            raise mismatch from error
        if absmax.ndim != 1 or absmax.shape != squares.shape or counts.ndim != 1 or len(counts) > BINS:
            raise mismatch
        observer = cls(matrix, len(absmax))
        observer.minimum, observer.maximum = minimum, maximum
        observer.rows, observer.exponent = int(rows), int(exponent)
        observer.channel_absmax[:], observer.channel_sum[:], observer.counts[: len(counts)] = absmax, squares, counts
        if (
            observer.counts.sum() != rows * len(absmax)
            or not (absmax >= 0).all()
            or not (squares >= 0).all()
            or not observer.absmax() < observer.limit
        ):
            raise mismatch
        return observer

    # -- ranges of symmetric 8 bit: the largest |x| that is not clipped ---------------------------------------------

    def absmax(self) -> float:
        """The largest |x|: nothing is clipped. 0 before the first row."""
        return float(self.channel_absmax.max(initial=0))

    def percentile(self, p: float) -> float:
        """The |x| that p per cent of all values do not exceed, to within a bin of the histogram.

        Values are taken as evenly spread within a bin. Raises InputError where p is not from 0 to 100.
        """
        if not 0 <= p <= 100:
            raise InputError(f"The percentile {p} is out of range: expected 0 to 100.")
        total = np.cumsum(self.counts)
        rank = p / 100 * total[-1]
        bin = int(total.searchsorted(rank))
        inside = self.counts[bin] - (total[bin] - rank)
        return min(float(self._edge(bin + inside / max(int(self.counts[bin]), 1))), self.absmax())

    def mse(self) -> float:
        """The range with the smallest expected squared error of rounding to 127 steps a side and of clipping.

        Minimised over the histogram, whose values are taken as evenly spread within each bin: the mean squared error
        criterion of Sung, Shin, Hwang 2015 (arXiv:1511.06488) and Banner, Nahshan, Soudry 2019 (ACIQ,
        arXiv:1810.05723), on the data itself.
        """
        largest = self.absmax()
        if not largest:
            return 0.0
        coarse = 2.0 ** np.arange(-10, 0.01, 1 / 8)
        best = coarse[self._errors(coarse * largest).argmin()]
        fine = np.minimum(best * 2.0 ** np.arange(-1 / 8, 1 / 8 + 0.001, 1 / 128), 1.0)
        return float(fine[self._errors(fine * largest).argmin()] * largest)

    def error(self, limit: float) -> float:
        """The expected squared error of a value that is rounded to 127 steps a side up to `limit` > 0.

        Values beyond `limit` are clipped. 0 before the first row.
        """
        return float(self._errors(np.array([limit]))[0] / self._edge(1)) / max(int(self.counts.sum()), 1)

    def _errors(self, clips: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Summed squared error [M] for each of M ranges, times the width of a bin."""
        used = self._used()
        edges = self._edge(np.arange(used + 1))
        steps = (clips / LEVELS)[:, None]
        place = edges / steps
        level = np.minimum(np.rint(place), LEVELS)
        # In units of the step: the integral of (u - nearest level)² from 0 to `place`, beyond the last level too.
        integral = level / 12 + (place - level) ** 3 / 3
        errors: npt.NDArray[np.float64] = np.diff(integral, axis=1) @ self.counts[:used] * steps[:, 0] ** 3
        return errors

    def entropy(self) -> float:
        """The range whose 128-level histogram loses the least information: the smallest KL divergence.

        Migacz, "8-bit inference with TensorRT", GTC 2017, which TensorRT's entropy calibrator follows. For every i from
        128 on, P is the first i bins with all outliers added to the last one. Q is those bins merged into 128 levels,
        each spread over its bins that are not empty.
        """
        levels = LEVELS + 1
        used = self._used()
        if used <= levels:
            return self.absmax()
        counts = self.counts[:used].astype(np.float64)
        sums, filled, entropies = (np.concatenate([[0.0], np.cumsum(part)]) for part in (counts, counts > 0, _xlogx(counts)))
        ends = np.arange(levels, used + 1)  # i
        bounds = -(-ends[:, None] * np.arange(levels + 1) // levels)  # where the levels begin: [candidates, 129]
        mass, bins = np.diff(sums[bounds], axis=1), np.diff(filled[bounds], axis=1)
        total, inside, last = sums[-1], sums[ends], counts[ends - 1]
        clipped = total - inside
        # KL(P || Q) = Σ p·log(p/q) / total + log(inside / total), in counts: p are those that q is made of, except for
        # the clipped values.
        spread = np.divide(mass, bins, out=np.ones_like(mass), where=bins > 0)
        with np.errstate(divide="ignore"):
            outliers = _xlogx(last + clipped) - _xlogx(last) - clipped * np.where(last > 0, np.log(spread[:, -1]), -np.inf)
        sum_of_logs = entropies[ends] - (mass * np.log(spread)).sum(axis=1) + np.where(clipped > 0, outliers, 0.0)
        divergence = sum_of_logs / total + np.log(np.maximum(inside, 1) / total)
        return min(float(self._edge(float(ends[divergence.argmin()]) - 0.5)), self.absmax())

    def _used(self) -> int:
        """Bins up to the last one that is not empty."""
        return int(np.flatnonzero(self.counts)[-1]) + 1 if self.rows else 0

    def _edge(self, bin: Any) -> Any:
        """The |x| where a bin (or part of one) begins."""
        return bin * (self.limit / BINS)


def _xlogx(x: Any) -> npt.NDArray[np.float64]:
    """x·log x, 0 at 0."""
    product: npt.NDArray[np.float64] = x * np.log(np.where(x > 0, x, 1.0))
    return product
