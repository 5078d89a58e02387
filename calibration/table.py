"""The calibration table: recorded texts and every model's statistics, in one file that can be used again and looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusionroute.calibration import checksummed_file
from fusionroute.calibration.observers import Observer
from fusionroute.calibration.record import Text
from fusionroute.calibration.serving_masks import shares
from fusionroute.runtime.errors import InputError, one_line

KIND = "calibration table"


@dataclass(frozen=True)
class Table:
    """`models` maps the router, then the experts in their order, to the statistics of each weight matrix by its name in the model's graph.

    `identity` is a digest of everything that the table depends on. An expert that was never chosen has observers without rows.
    """

    texts: list[Text]
    models: dict[str, dict[str, Observer]]
    identity: str

    def save(self, path: Path) -> None:
        """Write one safetensors file, in one step. Raises InputError where that fails."""
        tensors = {
            "ids": _joined([text.ids for text in self.texts], np.int32),
            "experts": _joined([text.experts for text in self.texts], np.int8),
            "lengths": np.array([len(text.ids) for text in self.texts], np.int64),
        }
        for model, observers in self.models.items():
            for matrix, observer in observers.items():
                tensors |= {f"{model}/{matrix}/{part}": tensor for part, tensor in observer.tensors().items()}
        names = {model: list(observers) for model, observers in self.models.items()}  # safetensors keeps no order
        checksummed_file.write(path, KIND, tensors, {"identity": self.identity, "models": json.dumps(names)})

    @classmethod
    def load(cls, path: Path) -> Table:
        """Read what `save` wrote. Raises InputError for a file that is missing, broken, or of another kind or format."""
        tensors, about = checksummed_file.read(path, KIND)
        try:
            names: dict[str, list[str]] = json.loads(about["models"])
            ends = np.cumsum(tensors["lengths"])[:-1]
            parts = (np.split(tensors[name], ends) if len(tensors["lengths"]) else [] for name in ("ids", "experts"))
            texts = [Text(ids, experts) for ids, experts in zip(*parts, strict=True)]
            models = {
                model: {matrix: Observer.of(matrix, _below(tensors, f"{model}/{matrix}/")) for matrix in matrices}
                for model, matrices in names.items()
            }
            return cls(texts, models, about["identity"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"The {KIND} {path} lacks a part or holds a wrong one ({one_line(error)}): make it again.") from error

    def summary(self) -> dict[str, Any]:
        """What a reader wants to know, as plain data: counts of tokens, shares of the experts, and `figures` of every matrix."""
        experts = list(self.models)[1:]
        return {
            "identity": self.identity,
            "texts": len(self.texts),
            "tokens": sum(len(text.ids) for text in self.texts),
            "answered": sum(int((text.experts >= 0).sum()) for text in self.texts),
            "shares": dict(zip(experts, shares(self.texts, len(experts)).tolist(), strict=True)),
            "models": {model: {matrix: figures(seen) for matrix, seen in observers.items()} for model, observers in self.models.items()},
        }


def figures(seen: Observer) -> dict[str, float | None]:
    """Rows seen, ranges (largest |x|, 99.99th percentile, least squared error at 8 bit), and the largest channel over the median one.

    The last is None where the median channel is zero.
    """
    median = float(np.median(seen.channel_absmax))
    return {
        "rows": seen.rows,
        "absmax": seen.absmax(),
        "p99.99": seen.percentile(99.99),
        "mse": seen.mse(),
        "outliers": seen.absmax() / median if median else None,
    }


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([*parts, np.zeros(0, dtype)]).astype(dtype)


def _below(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {part: tensors[prefix + part] for part in ("numbers", "absmax", "squares", "counts")}
