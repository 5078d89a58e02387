"""A row of the result: medians, percentiles, bytes and shares, computed from its runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusionroute.runtime.bench.counters import catch_ups, switches
from fusionroute.runtime.bench.run import Run
from fusionroute.runtime.bench.workload import ROUTER, Workload

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Variant


@dataclass(frozen=True)
class Row:
    """One workload in one precision: seconds, bytes, and bytes per second; None where the bundle does not tell bytes.

    With drafts models read several tokens at once: bytes per token and catch-ups are then left out. acceptance_rate:
    None without drafts.

    own: the median over all tokens of what one takes beyond the runs of its models; None where they run on a device.

    seconds_per_token: median over the texts of a text's mean, catch-ups included; p50, p95, p99 over all tokens; first
    tokens are apart. times_first: speed in multiples of the first row's, the median over the rounds. catch_ups: tokens
    that an expert read at once.
    """

    precision: str
    system: str
    first_token: float
    seconds_per_token: float
    tokens_per_second: float
    times_first: float
    p50: float
    p95: float
    p99: float
    switches: int
    experts: dict[str, int]
    catch_ups: list[int]
    weight_bytes_per_token: float | None
    bytes_per_second: float | None
    bandwidth_share: float | None
    acceptance_rate: float | None
    own: float | None
    runs: list[dict[str, Any]]


def summarise(
    precision: str,
    workload: Workload,
    runs: Sequence[Run],
    base: Sequence[Run],
    prompt: int,
    weights: Weights,
    bandwidth: float,
) -> Row:
    """A row from its runs and those of the first row, of the same rounds."""
    means = [float(np.mean(run.seconds)) for run in runs]
    typical = float(np.median(means))
    tokens = np.concatenate([run.seconds for run in runs])
    p50, p95, p99 = (float(value) for value in np.percentile(tokens, (50, 95, 99)))
    experts = runs[0].experts  # greedy texts do not differ
    read = weight_bytes(workload, experts[1:], weights) if weights.models and not workload.drafts else None
    drafted = sum(run.drafted for run in runs)
    rate = None if read is None else read / typical
    return Row(
        precision=precision,
        system=workload.name,
        first_token=float(np.median([run.first for run in runs])),
        seconds_per_token=typical,
        tokens_per_second=1 / typical,
        times_first=float(np.median([np.mean(first.seconds) / mean for first, mean in zip(base, means, strict=True)])),
        p50=p50,
        p95=p95,
        p99=p99,
        switches=switches(experts) if workload.expert else 0,
        experts=dict(Counter(experts)) if workload.expert else {},
        catch_ups=catch_ups(experts, prompt) if workload.expert and not workload.drafts else [],
        weight_bytes_per_token=read,
        bytes_per_second=rate,
        bandwidth_share=None if rate is None else rate / bandwidth,
        acceptance_rate=sum(run.accepted for run in runs) / max(drafted, 1) if workload.drafts else None,
        own=own_share(runs),
        runs=[asdict(run) for run in runs],
    )


def own_share(runs: Sequence[Run]) -> float | None:
    """The median over all tokens; None where it is not known."""
    own = [seconds for run in runs for seconds in run.own or ()]
    return float(np.median(own)) if own else None


class Weights(NamedTuple):
    """Bytes of weights that a token reads of each model, or nothing. base: that every pass reads, whoever it is for."""

    models: dict[str, int]
    base: int = 0


def weights_read(variant: Variant) -> Weights:
    """What the models of a variant read. Those of a pair read the router's weights too."""
    if variant.pair is None or not variant.weight_bytes:
        return Weights(variant.weight_bytes)
    return Weights(variant.weight_bytes | {ROUTER: 0}, variant.weight_bytes[ROUTER])


def weight_bytes(workload: Workload, experts: Sequence[str], weights: Weights) -> float:
    """Bytes of weights read per token, a mean over tokens from these experts."""
    router = weights.base + (weights.models[ROUTER] if workload.router else 0)
    return router + (float(np.mean([weights.models[name] for name in experts])) if workload.expert else 0.0)
