"""Observe one model: run it over the texts and collect statistics of the positions that it serves.

Interrupted runs go on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fusionroute.calibration.block import Block
from fusionroute.calibration.blockwise_forward import BlockwiseForward, Multiply, multiply
from fusionroute.calibration.observers import Observer
from fusionroute.calibration.record import RecordedText
from fusionroute.calibration.serving_masks import Mask
from fusionroute.runtime.errors import InputError

EVERY = 10.0  # seconds between two saved states
OTHERS = 8  # texts that a model reads which serves none


def observe(
    blocks: Sequence[Block],
    texts: Sequence[RecordedText],
    masks: Sequence[Mask],
    embed: Callable[[np.ndarray], np.ndarray],
    read: Callable[[str], np.ndarray],
    advance: Callable[[float], None] = lambda _: None,
    states: Path | None = None,
    identity: str = "",
    every: float = EVERY,
    threads: int | None = None,
    multiply: Multiply = multiply,
) -> dict[str, Observer]:
    """Statistics of the input of every matrix that the blocks name, in their order, and then of every cache.

    A model that serves nothing has observers of matrices without rows: it reads a few texts of others, for its caches
    alone, since it may be chosen later. Of each text the layers read the `body` of its mask, and the
    LM head counts at `head`. `embed`, `read`, `threads` and `multiply` are those of `BlockwiseForward`; `advance` is called with 1
    after every block. Where a file `states` is given, the run is saved there, at most once in `every` seconds, and a
    later call with the same blocks, texts and `identity` (of the weights) goes on from there. Any other file in its
    place is overwritten; at the end it is removed. Memory is that of `BlockwiseForward`. Raises InputError where
    activations are not finite, and as `BlockwiseForward` does.
    """
    observers = {matrix: Observer(matrix, width) for block in blocks for matrix, width in block.channels.items()}
    observers |= {cache: Observer(cache, block.cache_channels) for block in blocks for cache in block.caches}
    parts = [(text.ids[: mask.body], mask.head) for text, mask in zip(texts, masks, strict=True) if mask.body]
    serves = bool(parts)
    if not serves:
        parts = [(text.ids, np.zeros(0, np.int64)) for text in texts[:OTHERS]]
    if not parts:
        advance(len(blocks))
        return observers
    walk = BlockwiseForward(
        blocks, [ids for ids, _ in parts], embed, read, threads, f"{identity}/{[head.tolist() for _, head in parts]}", multiply
    )
    if states is not None:
        beside: dict[str, np.ndarray] = {}
        with contextlib.suppress(InputError):  # there is none, or one of another run
            beside = walk.restore(states)
        observers |= read_observers(beside)
    advance(walk.position)

    def see(matrix: str, number: int, x: np.ndarray) -> None:
        if serves and matrix not in twins:
            observers[matrix].see(x[parts[number][1]] if walk.block.name == "head" else x)

    def see_cache(cache: str, _: int, x: np.ndarray) -> None:
        observers[cache].see(x)

    saved = time.monotonic()
    while not walk.done:
        twins = twins_of(walk.block)
        walk.step(see, see_cache=see_cache)
        observers |= {matrix: Observer.of(matrix, observers[first].tensors()) for matrix, first in twins.items()}
        if states is not None and not walk.done and time.monotonic() - saved >= every:
            save(walk, states, observers)
            saved = time.monotonic()
        advance(1)
    if states is not None:
        with contextlib.suppress(OSError):  # none was written
            states.unlink()
    return observers


def twins_of(block: Block) -> dict[str, str]:
    """Matrix → an earlier one of the block that reads the same value."""
    first: dict[str, str] = {}
    for matrix, value in block.observed.items():
        first.setdefault(value, matrix)
    return {matrix: first[value] for matrix, value in block.observed.items() if first[value] != matrix}


def save(walk: BlockwiseForward, states: Path, observers: dict[str, Observer]) -> None:
    """Save position, states and statistics in one file. Where it cannot be written the run goes on without it."""
    tensors = {f"{matrix}/{part}": x for matrix, seen in observers.items() if seen.rows for part, x in seen.tensors().items()}
    with contextlib.suppress(InputError):
        walk.save(states, tensors)


def read_observers(tensors: Mapping[str, np.ndarray]) -> dict[str, Observer]:
    """The observers that `save` wrote beside the states."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        matrix, _, part = name.rpartition("/")
        parts.setdefault(matrix, {})[part] = tensor
    return {matrix: Observer.of(matrix, own) for matrix, own in parts.items()}
