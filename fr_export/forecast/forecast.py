"""The forecast of one export, from the headers of its checkpoints and a short measurement of the machine."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from fusionroute.fr_export.bundle.disk_space import (
    bits_on_disk,
    factor_width,
    factors_on_disk,
    free_space,
    largest_tensor,
    stored,
    weights_on_disk,
)  # fmt: skip
from fusionroute.fr_export.bundle.recording import recording_scheme
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.forecast.machine import slowness
from fusionroute.fr_export.forecast.stages import FASTER, LEAST, MOST, SLOWER, StageForecast, comparing, fits, stages
from fusionroute.fr_export.forecast.work import Work, parameters
from fusionroute.fr_export.precision import Scheme
from fusionroute.fr_export.precision.rank_budget import RankBudget
from fusionroute.fr_export.verify.compare import TOKENS
from fusionroute.runtime.errors import FusionError

FEWEST_TOKENS = 64  # compared even where that takes more than a tenth of the time
SHARE = 0.1  # of the export's time that the comparison takes where the command line does not say more


@dataclass(frozen=True)
class Forecast:
    """Plain data, for people and for `--json`. Sizes in bytes, ranges as (least, most).

    `peak_memory` is anonymous memory, in the stage `peak_stage`. `seconds` are of the whole export.
    """

    family: str
    max_seq_len: int
    sources: list[dict[str, Any]]
    variants: list[dict[str, Any]]
    disk_needed: int
    disk_free: int
    peak_memory: tuple[int, int]
    peak_stage: str
    memory_available: int
    seconds: tuple[float, float]
    compared_tokens: int
    stages: list[dict[str, Any]]

    @classmethod
    def of(
        cls,
        system: System,
        deltas: Mapping[str, Delta] | None,
        budget: RankBudget | None,
        plan: Sequence[tuple[str, Scheme]],
        prompts: Sequence[str],
        calibration: str,
        gpus: int,
        out: Path,
        compare: int | None,
    ) -> "Forecast":
        """Forecast the export of `plan`, a target and a scheme for each variant, to `out`.

        `deltas`: of the experts, where all models share one base, with the `budget` of approximations. `gpus` counts
        those that engines are built for; `compare` is the number of tokens, None for the default.
        """
        work = Work.of(system, prompts, deltas or {})
        values, factors = stored(system, deltas, budget)
        calibrated = fits(plan, calibration)
        tokens = default_tokens(work, plan, calibration, gpus) if compare is None else compare
        expected = stages(work, plan, calibration, gpus, tokens, slowness())
        peak = max(expected, key=lambda stage: stage.memory)
        total = sum(stage.seconds for stage in expected)
        needed = weights_on_disk(values, plan, calibrated, gpus > 0) + factors_on_disk(factors, plan)
        if calibrated and not calibration.endswith(".safetensors"):
            exact = {name: delta for name, delta in (deltas or {}).items() if not delta.matrices}
            recorded = stored(system, exact or None)
            needed = max(needed, int(recording_scheme(work.recorded).bits * recorded.values / 8) + 4 * recorded.factors)
        return cls(
            family=system.family.name,
            max_seq_len=system.max_seq_len,
            sources=[source(model) for model in system.models],
            variants=[variant(target, scheme, values, factors, calibrated) for target, scheme in plan],
            disk_needed=needed + largest_tensor(system, plan),  # for a moment it lies twice
            disk_free=free_space(out),
            peak_memory=(int(LEAST * peak.memory), int(MOST * peak.memory)),
            peak_stage=peak.name,
            memory_available=psutil.virtual_memory().available,
            seconds=seconds(total),
            compared_tokens=tokens,
            stages=[{"name": stage.name, "seconds": seconds(stage.seconds), "peak_memory": int(stage.memory)} for stage in expected],
        )


def source(model: Checkpoint) -> dict[str, Any]:
    """What a model is made from (see `SourceReport`), its folder, and its number of values."""
    return {"model": model.name, "folder": str(model.folder), "parameters": parameters(model), **asdict(model.source)}


def variant(target: str, scheme: Scheme, values: int, factors: int, calibrated: bool) -> dict[str, Any]:
    """A variant with its bits per weight and the bytes of its weights, the values of experts' `factors` among them."""
    bits, beside = bits_on_disk(scheme, calibrated), factor_width(target, scheme) * factors
    return {"target": target, "precision": scheme.name, "bits_per_weight": bits, "bytes": int(bits * values / 8) + beside}


def seconds(expected: float) -> tuple[float, float]:
    """The range in which the expected seconds are meant."""
    return round(FASTER * expected, 1), round(SLOWER * expected, 1)


def default_tokens(work: Work, plan: Sequence[tuple[str, Scheme]], calibration: str, gpus: int) -> int:
    """So many tokens that comparing them is expected to take a tenth of the export's time, from 64 to `TOKENS`.

    By the counts alone, not by the clock, so that one system is always compared on the same text.
    """
    others = total(stages(work, plan, calibration, gpus, 0, 1.0))
    allowed = others * SHARE / (1 - SHARE)
    fitting = (tokens for tokens in range(TOKENS, FEWEST_TOKENS, -1) if total(list(comparing(work, plan, tokens))) <= allowed)
    return next(fitting, FEWEST_TOKENS)


def total(parts: Sequence[StageForecast]) -> float:
    """Seconds of several stages."""
    return sum(part.seconds for part in parts)


def check_memory(forecast: Forecast, present: int) -> None:
    """Refuse before any work what needs more memory than there is: `present` bytes, swap included. Raises FusionError."""
    least, most = forecast.peak_memory
    if least > present:
        raise FusionError(
            f"The stage '{forecast.peak_stage}' needs about {least / 1e9:.1f} to {most / 1e9:.1f} GB of memory, and this machine has "
            f"{present / 1e9:.1f} GB with its swap: export on a larger one, add swap, or add --compare none or --calibration none."
        )
