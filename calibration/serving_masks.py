"""Which positions each model serves: those that its layers read, and those where its logits count."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusionroute.calibration.record import NOBODY, RecordedText


@dataclass(frozen=True)
class Mask:
    """A model's part in one text.

    Its layers read the first `body` positions; its logits count at the positions `head` (int64, ascending).
    """

    body: int
    head: npt.NDArray[np.int64]


def serving_masks(texts: Sequence[RecordedText], model: int | None) -> list[Mask]:
    """One mask per text: what the router (`model` None) or an expert (its index) serves of it.

    The router reads everything, and its logits count wherever an expert was chosen. An expert's logits count where it
    was chosen. By then it has read every position up to there, so its layers read up to the last of these positions
    and no further. An expert that is never chosen reads nothing.
    """
    masks = []
    for text in texts:
        head = np.flatnonzero(text.experts != NOBODY if model is None else text.experts == model)
        read = len(text.ids) if model is None else int(head[-1]) + 1 if len(head) else 0
        masks.append(Mask(read, head))
    return masks


def shares(texts: Sequence[RecordedText], n: int) -> npt.NDArray[np.float64]:
    """Each of n experts' share of the positions where one was chosen, float64 [n]; zeros where there are none."""
    counts = np.zeros(n, np.int64)
    for text in texts:
        counts += np.bincount(text.experts[text.experts != NOBODY], minlength=n)
    return counts / max(int(counts.sum()), 1)
