"""Observe one model: a walk over the texts, with statistics of what it serves, which can be cut off and taken up again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fusionroute.calibration.blockwise_forward import Block, Walk
from fusionroute.calibration.observers import Observer
from fusionroute.calibration.record import Text
from fusionroute.calibration.serving_masks import Mask
from fusionroute.runtime.errors import InputError

EVERY = 10.0  # seconds between savings


def observe(
    blocks: Sequence[Block],
    texts: Sequence[Text],
    masks: Sequence[Mask],
    embed: Callable[[np.ndarray], np.ndarray],
    read: Callable[[str], np.ndarray],
    advance: Callable[[float], None] = lambda _: None,
    states: Path | None = None,
    identity: str = "",
    every: float = EVERY,
    threads: int | None = None,
) -> dict[str, Observer]:
    """Statistics of the input of every matrix that the blocks name, in their order; one that serves nothing has observers without rows.

    Of each text the layers read the `body` of its mask, and the LM head counts at `head`. `embed` and `read` are those of `Walk`; `advance`
    hears of every block. With `states`, a file, the walk is saved there at most every `every` seconds and taken up again where it was
    saved under the same `identity` (of the weights) for the same texts; any other file in its place is overwritten, and it is gone at the end.
    Memory is that of a walk. Raises InputError where activations are not finite, and as `Walk` does.
    """
    observers = {matrix: Observer(matrix, width) for block in blocks for matrix, width in block.channels.items()}
    parts = [(text.ids[: mask.body], mask.head) for text, mask in zip(texts, masks, strict=True) if mask.body]
    if not parts:
        advance(len(blocks))
        return observers
    walk = Walk(blocks, [ids for ids, _ in parts], embed, read, threads, f"{identity}/{[head.tolist() for _, head in parts]}")
    if states is not None:
        beside: dict[str, np.ndarray] = {}
        with contextlib.suppress(InputError):  # nothing there, or what another walk left
            beside = walk.restore(states)
        observers |= seen_in(beside)
    advance(walk.position)

    def see(matrix: str, number: int, x: np.ndarray) -> None:
        observers[matrix].see(x[parts[number][1]] if walk.block.name == "head" else x)

    saved = time.monotonic()
    while not walk.done:
        walk.step(see)
        if states is not None and not walk.done and time.monotonic() - saved >= every:
            keep(walk, states, observers)
            saved = time.monotonic()
        advance(1)
    if states is not None:
        with contextlib.suppress(OSError):  # none was ever written
            states.unlink()
    return observers


def keep(walk: Walk, states: Path, observers: dict[str, Observer]) -> None:
    """Save the walk and what has been seen so far in one file. A file that cannot be written is no error: the walk goes on without."""
    tensors = {f"{matrix}/{part}": x for matrix, seen in observers.items() if seen.rows for part, x in seen.tensors().items()}
    with contextlib.suppress(InputError):
        walk.save(states, tensors)


def seen_in(tensors: Mapping[str, np.ndarray]) -> dict[str, Observer]:
    """The observers that `keep` wrote beside the states."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        matrix, _, part = name.rpartition("/")
        parts.setdefault(matrix, {})[part] = tensor
    return {matrix: Observer.of(matrix, found) for matrix, found in parts.items()}
