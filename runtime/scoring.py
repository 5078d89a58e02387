"""Teacher-forced scoring: the fused distribution at many positions of a known text, read in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusionroute.runtime import limits
from fusionroute.runtime.arguments import shown, whole_numbers
from fusionroute.runtime.backend import Fuser, FusionInputs, room_for
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.numerics import Numerics
from fusionroute.runtime.reader import Reader
from fusionroute.runtime.readers import Readers


@dataclass(frozen=True)
class Scores:
    """Teacher-forced results. logits float32 [P, V]: row t is the fused distribution of the token after position t.

    experts int64 [P] and routing float32 [P, n_experts] at the same positions (all of them unless `positions` said
    otherwise).
    """

    logits: np.ndarray
    experts: np.ndarray
    routing: np.ndarray


def positions_to_score(length: int, positions: Sequence[int] | None) -> list[int]:
    """The positions, all of them for None.

    Raises InputError for one outside the `length` tokens, and for no tokens.
    """
    asked = list(range(length)) if positions is None else whole_numbers(positions, "positions")
    if not length:
        raise InputError("There is nothing to score: expected at least one token id.")
    if wrong := [position for position in asked if not 0 <= position < length]:
        raise InputError(f"Position {shown(wrong[0])} is outside the {length} tokens: expected 0 to {length - 1}.")
    return asked


def score(
    readers: Readers,
    fuser: Fuser,
    numerics: Numerics,
    vocab_size: int,
    positions: Sequence[int],
    chunk: int,
    coefficients: tuple[float, float],
) -> Scores:
    """Fused logits at `positions`, in any order, of the committed tokens, which are read anew in chunks of `chunk`.

    Raises NumericalError where one of them, or a routing score there, is not finite.
    """
    ordered = sorted(set(positions))
    scores = _score_sorted(readers, fuser, numerics, vocab_size, np.asarray(ordered, np.int64), chunk, coefficients)
    if list(positions) == ordered:
        return scores
    rows = np.searchsorted(ordered, positions)
    return Scores(scores.logits[rows], scores.experts[rows], scores.routing[rows])


def _score_sorted(
    readers: Readers,
    fuser: Fuser,
    numerics: Numerics,
    vocab_size: int,
    positions: np.ndarray,
    chunk: int,
    coefficients: tuple[float, float],
) -> Scores:
    """`score` at ascending positions, int64 [P]."""
    tokens = readers.sequence.ids
    readers.forget()
    logits = np.empty((len(positions), vocab_size), np.float32)
    routing = np.empty((len(positions), len(readers.experts)), np.float32)

    def answer(expert: int, asked: np.ndarray) -> Any:
        return _read_until(readers.experts[expert], tokens, asked, chunk, vocab_size)

    for start in range(0, int(positions[-1]) + 1 if len(positions) else 0, chunk):
        piece = tokens[start : start + chunk]
        rows = np.flatnonzero((positions >= start) & (positions < start + len(piece)))
        routed = readers.router.forward(piece, [*(positions[rows] - start)] or [len(piece) - 1])
        if not len(rows):
            continue
        assert routed.routing is not None
        numerics.check_routings(routed.routing, positions[rows])
        routing[rows] = routed.routing
        logits[rows[0] : rows[-1] + 1] = _fused(
            routed.logits, routed.routing.argmax(-1), positions[rows], answer, fuser, numerics, coefficients, vocab_size
        )
    return Scores(logits, routing.argmax(-1).astype(np.int64), routing)


def score_last(
    readers: Readers,
    fuser: Fuser,
    numerics: Numerics,
    vocab_size: int,
    count: int,
    coefficients: tuple[float, float],
    pinned: int | None,
) -> Scores:
    """The fused logits that each of the last `count` committed tokens would have been chosen from, one row a token.

    Models read on from what they have read, and only those with a say run: see `PlainStep.advance`. At least one token
    must stand before them. Raises NumericalError as `score` does.
    """
    end = len(readers.sequence.ids) - 1
    logits = np.empty((count, vocab_size), np.float32)
    routing = np.full((count, len(readers.experts)), np.nan, np.float32)
    choices = np.full(count, 0 if pinned is None else pinned, np.int64)

    def answer(expert: int, asked: np.ndarray) -> Any:
        return readers.read_expert(expert, asked.tolist()).logits

    piece = max(readers.router.chunk // 2, 1)  # a pass may begin a token before its first row, and must not be cut behind it
    for start in range(end - count, end, piece):
        positions = np.arange(start, min(start + piece, end))
        rows = slice(start - end + count, int(positions[-1]) - end + count + 1)
        routed = None
        if pinned is None or coefficients[0]:
            routed = readers.router.read(positions.tolist())
            assert routed.routing is not None
            numerics.check_routings(routed.routing, positions)
            routing[rows] = routed.routing
        if pinned is None:
            choices[rows] = routing[rows].argmax(-1)
        router_logits = None if routed is None else routed.logits
        logits[rows] = _fused(router_logits, choices[rows], positions, answer, fuser, numerics, coefficients, vocab_size)
    return Scores(logits, choices, routing)


def _fused(
    router: Any,
    choices: np.ndarray,
    positions: np.ndarray,
    answer: Callable[[int, np.ndarray], Any],
    fuser: Fuser,
    numerics: Numerics,
    coefficients: tuple[float, float],
    vocab_size: int,
) -> np.ndarray:
    """Fused logits float32 [K, V] at positions [K] and the experts chosen there [K].

    router: its logits [K, V], None where it did not run. `answer`: an expert's logits at some of the positions.
    """
    logits = np.empty((len(positions), vocab_size), np.float32)
    rows_at_a_time = max(1, limits.FUSED // vocab_size)
    for expert in np.unique(choices):
        own = np.flatnonzero(choices == expert)
        answered = answer(int(expert), positions[own]) if coefficients[1] else router[own]
        routed = answered if router is None else router[own]  # a stand-in, of weight zero
        for begin in range(0, len(own), rows_at_a_time):
            part = slice(begin, begin + rows_at_a_time)
            fused = fuser(FusionInputs(routed[part], answered[part], coefficients))
            numerics.check_fusions(fused, routed[part], answered[part], int(expert), positions[own[part]])
            logits[own[part]] = fused.rows
    return logits


def _read_until(expert: Reader, tokens: Sequence[int], positions: np.ndarray, chunk: int, vocab_size: int) -> Any:
    """Let an expert read up to the last position in chunks; its logits at all of them [len(positions), V], see `Output`."""
    start, end, written, logits = expert.length, int(positions[-1]) + 1, 0, None
    while start < end:
        piece = tokens[start : min(start + chunk, end)]
        inside = [int(position) - start for position in positions if start <= position < start + len(piece)]
        output = expert.forward(piece, inside or [len(piece) - 1])
        if inside:
            if logits is None:
                logits = room_for(output.logits, len(positions), vocab_size)
            logits[written : written + len(inside)] = output.logits
            written += len(inside)
        start += len(piece)
    return logits
