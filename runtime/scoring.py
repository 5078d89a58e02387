"""Teacher-forced scoring: the fused distribution at many positions of a known text, which is read in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusionroute.runtime import limits
from fusionroute.runtime.backend import REUSED, FusionInputs

if TYPE_CHECKING:
    from fusionroute.runtime.session import Session


@dataclass(frozen=True)
class Scores:
    """Teacher-forced results. logits float32 [P, V]: row t is the fused distribution of the token after position t.

    experts int64 [P] and routing float32 [P, n_experts] at the same positions (all of them unless `positions` said otherwise).
    """

    logits: np.ndarray
    experts: np.ndarray
    routing: np.ndarray


def score(session: Session, positions: Sequence[int], chunk: int, coefficients: tuple[float, float]) -> Scores:
    """Fused logits at sorted `positions` of the committed tokens, which are read anew, in chunks of `chunk` tokens."""
    vocab, tokens, fuse = session.vocab_size, session.tokens, session.fuse
    session.reset()
    logits = np.empty((len(positions), vocab), np.float32)
    routing = np.empty((len(positions), len(session.names)), np.float32)
    wanted = np.asarray(positions, np.int64)
    step = max(1, limits.FUSED // vocab)
    for start in range(0, positions[-1] + 1 if positions else 0, chunk):
        piece = tokens[start : start + chunk]
        rows = np.flatnonzero((wanted >= start) & (wanted < start + len(piece)))
        local = wanted[rows] - start
        routed = session.forward(None, piece, [*local] or [len(piece) - 1])
        if not len(rows):
            continue
        assert routed.routing is not None
        routing[rows] = routed.routing
        choice = routed.routing.argmax(-1)
        for expert in np.unique(choice):
            mine = np.flatnonzero(choice == expert)
            answered = _catch_up(session, int(expert), wanted[rows[mine]], chunk) if coefficients[1] else routed.logits[mine]
            for begin in range(0, len(mine), step):
                part = mine[begin : begin + step]
                router = np.ascontiguousarray(routed.logits[part])
                logits[rows[part]] = fuse(FusionInputs(router, answered[begin : begin + step], coefficients)).rows
    return Scores(logits, routing.argmax(-1).astype(np.int64), routing)


def _catch_up(session: Session, expert: int, wanted: np.ndarray, chunk: int) -> np.ndarray:
    """Let an expert read up to the last wanted position in chunks; its logits at all of them, float32 [len(wanted), V]."""
    found = []
    start = session.reached(expert)
    while start <= wanted[-1]:
        piece = session.tokens[start : min(start + chunk, int(wanted[-1]) + 1)]
        local = [int(p) - start for p in wanted if start <= p < start + len(piece)]
        answered = session.forward(expert, piece, local or [len(piece) - 1])
        if local:
            found.append(answered.logits.copy() if len(local) <= REUSED else answered.logits)
        start += len(piece)
    return np.concatenate(found) if len(found) != 1 else found[0]
