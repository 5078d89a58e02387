"""The systems that are measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.delta_bits.changes import BLOCKS, Decomposed, rounded_change
from benchmarks.delta_bits.laboratory import Laboratory, Matrices
from fusionroute.fr_export.bundle.shared_base import weight_count
from fusionroute.fr_export.precision.rank_budget import RankBudget


@dataclass(frozen=True)
class Row:
    """One system: its line in the picture and its name; `bits` of all models per weight of one; its matrices by model; and,
    of factors, the means of `Ranks.left` and `Ranks.error` over the experts.
    """

    line: str
    name: str
    bits: float
    matrices: Mapping[str, Matrices]
    left: float | None = None
    error: float | None = None

    @property
    def figures(self) -> dict[str, Any]:
        """All but the matrices."""
        return {"line": self.line, "bits": self.bits, "left": self.left, "error": self.error}


def rows(laboratory: Laboratory, bits: Sequence[float]) -> Iterator[Row]:
    """Every row."""
    system = laboratory.system
    router, experts = system.router, system.experts
    weights = weight_count(laboratory.graphs[router.name])
    for precision in ("int8", "int4"):
        own = {model.name: laboratory.rounded(model, precision) for model in system.models}
        total = sum(cost for _, cost in own.values())
        yield Row(f"{precision} of everything", precision, total, {name: matrices for name, (matrices, _) in own.items()})
        base, cost = own[router.name]
        blocks = {e.name: {k: v for c in laboratory.changes(e, base, True) for k, v in rounded_change(c)} for e in experts}
        yield Row(f"{precision} base, 2-bit blocks", precision, cost + len(experts) * BLOCKS.bits_per_weight, {router.name: base} | blocks)
        for weighting in ("weighted", "plain"):
            decomposed = {
                expert.name: [Decomposed.of(each) for each in laboratory.changes(expert, base, weighting == "weighted")]
                for expert in experts
            }
            for budget in bits:
                spread = {
                    name: RankBudget(bits=budget).spread([each.spectrum for each in changes], weights)
                    for name, changes in decomposed.items()
                }
                approximated = {
                    name: {key: values for each in changes for key, values in each.approximated(spread[name].of)}
                    for name, changes in decomposed.items()
                }
                spent = cost + sum(ranks.bits for ranks in spread.values())
                left, error = (float(np.mean([getattr(ranks, key) for ranks in spread.values()])) for key in ("left", "error"))
                line, name = f"{precision} base, {weighting} SVD", f"{precision}, {budget} bits"
                yield Row(line, name, spent, {router.name: base} | approximated, left, error)
