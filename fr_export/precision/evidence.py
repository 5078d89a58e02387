"""What calibration learned of one model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusionroute.calibration.observers import Observer
from fusionroute.calibration.record import RecordedText
from fusionroute.calibration.serving_masks import Mask, serving_masks
from fusionroute.calibration.table import Table
from fusionroute.fr_export.checkpoints.weights import Weights


@dataclass(frozen=True)
class Evidence:
    """The recorded texts, the positions in each that the model serves, and matrix → statistics of its inputs there; also
    cache, such as `present.0.key` → statistics of its keys or values.

    An expert that was never chosen has statistics of matrices without rows. sharing: of models that read the same rounded matrices and
    add a difference of their own (the weights of each); their statistics are part of `observed`.
    """

    recorded: Sequence[RecordedText]
    masks: Sequence[Mask]
    observed: Mapping[str, Observer]
    sharing: "Sequence[tuple[Weights, Evidence]]" = ()

    @property
    def texts(self) -> list[np.ndarray]:
        """The token ids int32 [S] of the texts that the model read; empty for an expert that was never chosen."""
        return [text.ids[: mask.body] for text, mask in zip(self.recorded, self.masks, strict=True) if mask.body]


def pooled(own: Evidence, sharing: Sequence[tuple[Weights, Evidence]]) -> Evidence:
    """The evidence for a base that other models read too."""
    observed = pool([own.observed, *(known.observed for _, known in sharing)])
    return replace(own, observed=observed, sharing=sharing)


def pool(observed: Sequence[Mapping[str, Observer]]) -> dict[str, Observer]:
    """Statistics of several models' inputs, by matrix."""
    total = {matrix: Observer(matrix, len(seen.channel_absmax)) for matrix, seen in observed[0].items()}
    for matrix, seen in total.items():
        for each in observed:
            seen.add(each[matrix])
    return total


def evidence(table: Table) -> dict[str, Evidence]:
    """A calibration table by model."""
    masks = [serving_masks(table.texts, number - 1 if number else None) for number in range(len(table.models))]
    return {model: Evidence(table.texts, part, seen) for (model, seen), part in zip(table.models.items(), masks, strict=True)}
