"""The report of an evaluation: numbers with intervals for results.json, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fusionroute.fr_export.evaluation import routing
from fusionroute.fr_export.evaluation.bootstrap import compare, interval
from fusionroute.fr_export.evaluation.outcomes import Outcomes
from fusionroute.fr_export.evaluation.questions import Question, Questions
from fusionroute.fr_export.evaluation.scoring import bleu
from fusionroute.fr_export.evaluation.token_classes import CLASSES
from fusionroute.runtime.tables import tables


@dataclass(frozen=True)
class Row:
    """One method on one precision of one bundle; outcomes by domain."""

    bundle: str
    precision: str
    method: str
    outcomes: Mapping[str, Outcomes]

    @property
    def experts(self) -> list[str]:
        """Expert names in the bundle's order."""
        return next(iter(self.outcomes.values())).experts


def summary(rows: Sequence[Row], questions: Questions, seed: int) -> list[dict[str, Any]]:
    """One JSON object per row.

    Accuracy and F1 are shares from 0 to 1 with 95 % bootstrap intervals, BLEU is from 0 to 100 or None. `against_first`
    is the paired bootstrap of the average accuracy against that of the first row, None for the first row. `routing`
    holds each expert's share of the tokens, by domain and by token class.
    """
    entries = []
    for row in rows:
        domains = {domain: _scores([outcomes], seed) | _texts(outcomes, questions[domain]) for domain, outcomes in row.outcomes.items()}
        bleus = [scores["bleu"] for scores in domains.values() if scores["bleu"] is not None]
        average = _scores([*row.outcomes.values()], seed) | {"bleu": float(np.mean(bleus)) if bleus else None}
        own, first = ([outcomes.correct for outcomes in one.outcomes.values()] for one in (row, rows[0]))
        entries.append({
            "bundle": row.bundle, "precision": row.precision, "method": row.method, "domains": domains, "average": average,
            "against_first": None if row is rows[0] else compare(own, first, seed)._asdict(),
            "routing": {
                "domains": _named(row.outcomes, row.experts, routing.by_domain(row.outcomes)),
                "classes": _named(CLASSES, row.experts, routing.by_class(row.outcomes)),
            },
        })  # fmt: skip
    return entries


def _scores(outcomes: Sequence[Outcomes], seed: int) -> dict[str, Any]:
    correct, overlap = (interval([getattr(one, name) for one in outcomes], seed) for name in ("correct", "f1"))
    return {"accuracy": correct._asdict(), "f1": overlap._asdict()}


def _texts(outcomes: Outcomes, questions: Sequence[Question]) -> dict[str, Any]:
    return {
        "bleu": bleu(outcomes.answers, [question.answer for question in questions]),
        "prompts": len(outcomes),
        "tokens": float(outcomes.tokens.mean()),
    }


def _named(names: Iterable[str], experts: Sequence[str], shares: np.ndarray) -> dict[str, dict[str, float] | None]:
    rows = zip(names, shares.tolist(), strict=True)
    return {name: None if np.isnan(row).any() else dict(zip(experts, row, strict=True)) for name, row in rows}


def shown(console: Console, entries: Sequence[dict[str, Any]]) -> list[Table]:
    """Accuracy with the half-width of its interval and the difference from the first row; F1 and BLEU."""
    names, domains = ("bundle", "precision", "method"), list(entries[0]["domains"])
    accuracy, texts = [], []
    for entry in entries:
        row = [entry["bundle"], entry["precision"], entry["method"]]
        columns = [*entry["domains"].values(), entry["average"]]
        against = entry["against_first"]
        compared = ["", ""] if against is None else [f"{_percent(against, 'difference'):+.1f} {_half(against)}", f"{against['p']:.3f}"]
        accuracy.append([*row, *(f"{_percent(c['accuracy']):.1f} {_half(c['accuracy'])}" for c in columns), *compared])
        texts.append([*row, *(f"{_percent(c['f1']):.1f} / {'–' if c['bleu'] is None else format(c['bleu'], '.1f')}" for c in columns)])
    title = "Exact match in %, ± half of the 95 % bootstrap interval"
    return [
        *tables(console, title, names, [*domains, "average", "− first row", "p"], accuracy),
        *tables(console, "Word F1 in % / BLEU", names, [*domains, "average"], texts),
    ]


def _percent(score: Mapping[str, float], key: str = "value") -> float:
    return 100 * score[key]


def _half(score: Mapping[str, float]) -> str:
    return f"±{50 * (score['high'] - score['low']):.1f}"
