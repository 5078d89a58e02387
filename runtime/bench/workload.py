"""The workloads of a benchmark, one row each: the fused system, or one of its models alone."""

from __future__ import annotations

from typing import NamedTuple

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.options import fusion_coefficients
from fusionroute.runtime.session import Session

FUSED, ROUTER = "fused", "router"
DRAFTS = "+drafts"  # behind a row's name: with speculation


class Workload(NamedTuple):
    """A way to run a bundle.

    `router` and `expert`: whether such a model reads each token. `pinned`: the expert of every token; None: routed.
    """

    name: str
    router: bool
    expert: bool
    pinned: str | None
    fusion: str
    lam: float
    drafts: bool = False

    def session(self, runtime: FusionRuntime) -> Session:
        """A session for it."""
        return runtime.session(self.fusion, self.lam, self.pinned)


def workloads(names: str, runtime: FusionRuntime) -> list[Workload]:
    """The workloads of a comma list: `fused` (routed), `fused:EXPERT` (always that expert), `router` or EXPERT (alone).

    Each may end in `+drafts`: it then speculates.

    Raises InputError for any other name.
    """
    return [workload(name.strip(), runtime) for name in dict.fromkeys(names.split(","))]


def workload(name: str, runtime: FusionRuntime) -> Workload:
    """One of `workloads`."""
    if name.endswith(DRAFTS):
        return workload(name.removesuffix(DRAFTS), runtime)._replace(name=name, drafts=True)
    first, _, pinned = name.partition(":")
    if name == FUSED or (first == FUSED and pinned in runtime.expert_names):
        weights = fusion_coefficients(runtime.fusion, runtime.lam)
        return Workload(name, not pinned or weights[0] > 0, weights[1] > 0, pinned or None, runtime.fusion, runtime.lam)
    if name == ROUTER:
        return Workload(name, True, False, None, "weighted", 1.0)
    if name in runtime.expert_names:
        return Workload(name, False, True, name, "weighted", 0.0)
    experts = ", ".join(runtime.expert_names)
    raise InputError(f"Unknown row '{name}': use {FUSED}, {FUSED}:EXPERT, {ROUTER} or the name of an expert ({experts}).")
