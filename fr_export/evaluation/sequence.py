"""Sequence-level selection: choose among the whole answers that each expert gave alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusionroute.fr_export.evaluation.outcomes import Outcomes, joined
from fusionroute.runtime.errors import InputError


def most_likely(alone: Sequence[Outcomes]) -> Outcomes:
    """Per question the expert answer with the highest mean log-probability per token.

    The log-probabilities are those of the answering expert; among equals the first wins. alone: the outcomes of each
    expert alone, in the bundle's order. Raises InputError where they answer different prompts.
    """
    return _chosen(alone, np.argmax([outcomes.logprob for outcomes in _same(alone)], axis=0))


def first_routed(alone: Sequence[Outcomes], routed: Outcomes) -> Outcomes:
    """Per question the answer of the expert that the router chose at the prompt's last token.

    routed: outcomes of a method that the router leads (`fused`, `token`, `router`). Raises InputError where they answer
    different prompts.
    """
    _same([*alone, routed])
    return _chosen(alone, routed.first)


def _chosen(alone: Sequence[Outcomes], choice: np.ndarray) -> Outcomes:
    count = len(choice)
    return joined(alone).rows(choice.astype(np.int64) * count + np.arange(count))


def _same(outcomes: Sequence[Outcomes]) -> Sequence[Outcomes]:
    if len({one.questions for one in outcomes}) > 1:
        raise InputError("The outcomes to choose among belong to different prompts: evaluate them on the same ones.")
    return outcomes
