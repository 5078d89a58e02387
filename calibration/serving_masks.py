"""Which positions each model serves: what its layers read, and where its logits count."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusionroute.calibration.record import NOBODY, Text


@dataclass(frozen=True)
class Mask:
    """A model's part in one text: its layers read the first `body` positions, its logits count at `head` (int64, ascending)."""

    body: int
    head: npt.NDArray[np.int64]


def served(texts: Sequence[Text], model: int | None) -> list[Mask]:
    """What the router (None) or an expert serves of each text.

    The router reads everything and answers wherever somebody was asked. An expert answers where it was chosen; by then it has read, through
    catch-up, every position up to there, and it never reads what comes behind the last one. One that is never chosen reads nothing.
    """
    masks = []
    for text in texts:
        head = np.flatnonzero(text.experts != NOBODY if model is None else text.experts == model)
        read = len(text.ids) if model is None else int(head[-1]) + 1 if len(head) else 0
        masks.append(Mask(read, head))
    return masks


def shares(texts: Sequence[Text], n: int) -> npt.NDArray[np.float64]:
    """The share [n] of the answered positions that each of n experts answered; zeros where there are none."""
    counts = np.zeros(n, np.int64)
    for text in texts:
        counts += np.bincount(text.experts[text.experts != NOBODY], minlength=n)
    return counts / max(int(counts.sum()), 1)
