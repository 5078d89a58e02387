"""What a calibrated precision knows of one model besides its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusionroute.calibration.observers import Observer
from fusionroute.calibration.record import Text
from fusionroute.calibration.serving_masks import Mask, served
from fusionroute.calibration.table import Table


@dataclass(frozen=True)
class Evidence:
    """The recorded texts, the model's part in each, and matrix → statistics of what entered it there (without rows where it has no part)."""

    recorded: Sequence[Text]
    masks: Sequence[Mask]
    observed: Mapping[str, Observer]

    @property
    def texts(self) -> list[np.ndarray]:
        """The token ids int32 [S] that the model read; none for an expert that was never chosen."""
        return [text.ids[: mask.body] for text, mask in zip(self.recorded, self.masks, strict=True) if mask.body]


def evidence(table: Table) -> dict[str, Evidence]:
    """Every model's part of a calibration table."""
    masks = [served(table.texts, number - 1 if number else None) for number in range(len(table.models))]
    return {model: Evidence(table.texts, part, seen) for (model, seen), part in zip(table.models.items(), masks, strict=True)}
