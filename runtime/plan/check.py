"""The estimate against a short run of the same bundle on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from fusionroute.runtime.bench.bench import BenchOptions, bench
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.plan.memory import memory_of
from fusionroute.runtime.plan.plan import Plan
from fusionroute.runtime.plan.speed import decode_speed

NEW_TOKENS, PROMPT_TOKENS, REPEATS = 32, 64, 3


@dataclass(frozen=True)
class Check:
    """Tokens per second of a precision: estimated for the text that was written, and measured. error: of the estimate."""

    precision: str
    estimated: float
    measured: float
    switch_rate: float
    error: float

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def check(bundle: Bundle, plan: Plan) -> list[Check]:
    """Run every precision that was planned and fits: a prompt, and tokens behind it. The estimate takes the switches and
    the catching up from that run, so that it is about the same work.
    """
    here = [choice.precision for choice in plan.choices if choice.fits]
    own = {variant.precision for variant in bundle.manifest.variants if variant.target == plan.device.target}
    names = tuple(name for name in here if name in own)
    if not names:
        return []
    tokens = min(PROMPT_TOKENS, bundle.manifest.max_seq_len - NEW_TOKENS)
    options = BenchOptions(precisions=names, prompt_tokens=tokens, new_tokens=NEW_TOKENS, repeats=REPEATS, sequential=True, trusted=True)
    rows = bench(bundle.folder, options)["rows"]
    checks = []
    for row in rows:
        system = plan.request.build(plan.device.target, row["precision"])
        length = 2 * tokens + NEW_TOKENS  # of which estimates take half
        later = NEW_TOKENS - 1
        missed = sum(count - 1 for count in row["catch_ups"]) / later
        text = replace(plan.text, switch_rate=row["switches"] / later, acceptance=None, missed=missed)
        estimated = decode_speed(system, plan.device, memory_of(system, plan.device, length), length, text)[1]
        measured = row["tokens_per_second"]
        checks.append(Check(row["precision"], estimated, measured, text.switch_rate, estimated / measured - 1))
    return checks
