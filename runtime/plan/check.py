"""The estimate against a short run of the same bundle on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from fusionroute.runtime.bench.bench import BenchOptions, bench
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.plan.devices import Device
from fusionroute.runtime.plan.machine import this_machine
from fusionroute.runtime.plan.memory import memory_of
from fusionroute.runtime.plan.plan import Plan
from fusionroute.runtime.plan.speed import Text, decode_speed

NEW_TOKENS, PROMPT_TOKENS, REPEATS = 32, 64, 3


@dataclass(frozen=True)
class Check:
    """Tokens per second of a precision: estimated for the text that was written, and measured. bandwidth:
    bytes/s that the estimate is made with. error: of the estimate.
    """

    precision: str
    estimated: float
    measured: float
    bandwidth: float
    switch_rate: float
    error: float

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def check(bundle: Bundle, plan: Plan) -> list[Check]:
    """Run every precision that was planned and fits: a prompt, and tokens behind it.

    The estimate takes the switches and the catching up from that run, so that it is about the same work, and the median
    of the bandwidth for the plan, before the run and after it: where others use the machine it is never the same long.
    """
    own = {variant.precision for variant in bundle.manifest.variants if variant.target == plan.device.target}
    tokens = min(PROMPT_TOKENS, bundle.manifest.max_seq_len - NEW_TOKENS)
    checks = []
    for name in [choice.precision for choice in plan.choices if choice.fits and choice.precision in own]:
        options = BenchOptions((name,), prompt_tokens=tokens, new_tokens=NEW_TOKENS, repeats=REPEATS, trusted=True)
        result = bench(bundle.folder, options)
        speeds = (plan.device.bandwidth, result["machine"]["read_bandwidth"], this_machine().bandwidth)
        checks.append(of_row(result["rows"][0], plan, replace(plan.device, bandwidth=median(speeds)), tokens))
    return checks


def of_row(row: dict[str, Any], plan: Plan, device: Device, tokens: int) -> Check:
    """The estimate beside a row of the benchmark, behind a prompt of so many tokens."""
    system = plan.request.build(device.target, row["precision"])
    length = 2 * tokens + NEW_TOKENS  # of which estimates take half
    later = NEW_TOKENS - 1  # the first token belongs to the prompt
    missed = sum(count - 1 for count in row["catch_ups"]) / later
    text = Text(row["switches"] / later, None, missed)
    estimated = decode_speed(system, device, memory_of(system, device, length), length, text)[1]
    measured = row["tokens_per_second"]
    return Check(row["precision"], estimated, measured, device.bandwidth, text.switch_rate, estimated / measured - 1)
