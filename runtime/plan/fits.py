"""The fits that estimates rest on, each made once."""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

from fusionroute.runtime.plan import efficiency, processors
from fusionroute.runtime.plan.devices import Kind
from fusionroute.runtime.plan.efficiency import Efficiency
from fusionroute.runtime.plan.measurements import measurements
from fusionroute.runtime.plan.processors import Processor

Fit: TypeAlias = Efficiency | Processor


@cache
def fit_of(kind: Kind) -> Fit:
    """Fitted to all rows of GPUs, or of processors, that say enough to count bytes."""
    rows = [row for row in measurements(kind) if row.sure]
    return efficiency.fitted(rows) if kind == "gpu" else processors.fitted(rows)
