"""What calibration learned of one model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusionroute.calibration.observers import Observer
from fusionroute.calibration.record import RecordedText
from fusionroute.calibration.serving_masks import Mask, serving_masks
from fusionroute.calibration.table import Table


@dataclass(frozen=True)
class Evidence:
    """The recorded texts, the positions in each that the model serves, and matrix → statistics of its inputs there.

    An expert that was never chosen has statistics without rows.
    """

    recorded: Sequence[RecordedText]
    masks: Sequence[Mask]
    observed: Mapping[str, Observer]

    @property
    def texts(self) -> list[np.ndarray]:
        """The token ids int32 [S] of the texts that the model read; empty for an expert that was never chosen."""
        return [text.ids[: mask.body] for text, mask in zip(self.recorded, self.masks, strict=True) if mask.body]


def evidence(table: Table) -> dict[str, Evidence]:
    """A calibration table by model."""
    masks = [serving_masks(table.texts, number - 1 if number else None) for number in range(len(table.models))]
    return {model: Evidence(table.texts, part, seen) for (model, seen), part in zip(table.models.items(), masks, strict=True)}
