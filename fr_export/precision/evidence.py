"""What a calibrated precision knows of one model besides its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.observers import Observer
from calibration.served import served
from calibration.table import Table


@dataclass(frozen=True)
class Evidence:
    """`texts`: the token ids int32 [S] that a model read. `heads`: the positions of each where its logits counted.

    `observed`: matrix → statistics of what entered it there. All are empty for an expert that was never chosen.
    """

    texts: Sequence[np.ndarray]
    heads: Sequence[np.ndarray]
    observed: Mapping[str, Observer]


def evidence(table: Table) -> dict[str, Evidence]:
    """Every model's part of a calibration table."""
    found = {}
    for number, (model, observed) in enumerate(table.models.items()):
        masks = served(table.texts, number - 1 if number else None)
        read = [(text.ids[: mask.body], mask.head) for text, mask in zip(table.texts, masks, strict=True) if mask.body]
        found[model] = Evidence([ids for ids, _ in read], [head for _, head in read], observed)
    return found
