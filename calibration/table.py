"""The calibration table: recorded texts and statistics of every model, in one file that later exports can use."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusionroute.calibration import checksummed_file
from fusionroute.calibration.observers import Observer
from fusionroute.calibration.record import RecordedText
from fusionroute.calibration.serving_masks import shares
from fusionroute.runtime.errors import InputError, one_line

KIND = "calibration table"
CACHE = "present."  # what the names of caches begin with


@dataclass(frozen=True)
class Table:
    """The texts, and by model the statistics of what enters each weight matrix, and of each cache of keys or values, by their
    names in the model's graph.

    `models` has the router first, then the experts in their order. `identity` is a digest of everything that the table
    depends on. An expert that was never chosen has observers without rows.
    """

    texts: list[RecordedText]
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
        """Read a file that `save` wrote.

        Raises InputError where it is missing, broken, or of another kind or format.
        """
        tensors, about = checksummed_file.read(path, KIND)
        try:
            names: dict[str, list[str]] = json.loads(about["models"])
            ends = np.cumsum(tensors["lengths"])[:-1]
            parts = (np.split(tensors[name], ends) if len(tensors["lengths"]) else [] for name in ("ids", "experts"))
            texts = [RecordedText(ids, experts) for ids, experts in zip(*parts, strict=True)]
            models = {
                model: {matrix: Observer.of(matrix, _below(tensors, f"{model}/{matrix}/")) for matrix in matrices}
                for model, matrices in names.items()
            }
            return cls(texts, models, about["identity"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"The {KIND} {path} lacks a part or holds a wrong one ({one_line(error)}): make it again.") from error

    def check_models(self, names: Sequence[str]) -> None:
        """Raise InputError where the table is of other models than these, the router first."""
        if list(self.models) != list(names):
            raise InputError(
                f"The calibration table is of the models {', '.join(self.models) or 'none'}, the system has {', '.join(names)}: "
                "calibrate this system instead."
            )

    @property
    def knows_caches(self) -> bool:
        """Whether it has statistics of keys and values: tables of older versions have none."""
        return all(any(name.startswith(CACHE) for name in observers) for observers in self.models.values())

    def summary(self) -> dict[str, Any]:
        """The table as plain data: counts of texts and tokens, shares of the experts, and `figures` of every matrix."""
        experts = list(self.models)[1:]
        return {
            "identity": self.identity,
            "texts": len(self.texts),
            "tokens": sum(len(text.ids) for text in self.texts),
            "answered": sum(int((text.experts >= 0).sum()) for text in self.texts),
            "shares": dict(zip(experts, shares(self.texts, len(experts)).tolist(), strict=True)),
            "models": {
                model: {matrix: figures(observer) for matrix, observer in observers.items()} for model, observers in self.models.items()
            },
        }


def figures(observer: Observer) -> dict[str, float | None]:
    """The numbers that people look at.

    rows; the ranges absmax (largest |x|), p99.99 (percentile) and mse (least squared error at 8 bit); outliers, the
    largest channel's absmax over the median channel's, or None where the median is zero.
    """
    median = float(np.median(observer.channel_absmax))
    return {
        "rows": observer.rows,
        "absmax": observer.absmax(),
        "p99.99": observer.percentile(99.99),
        "mse": observer.mse(),
        "outliers": observer.absmax() / median if median else None,
    }


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([*parts, np.zeros(0, dtype)]).astype(dtype)


def _below(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {part: tensors[prefix + part] for part in ("numbers", "absmax", "squares", "counts")}
