"""A plan: every precision of a system on a device, with what it takes and how fast it is expected to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.plan.devices import Device
from fusionroute.runtime.plan.fits import fit_of
from fusionroute.runtime.plan.measurements import measurements
from fusionroute.runtime.plan.memory import Memory, memory_of
from fusionroute.runtime.plan.speed import Range, Text, decode_speed, prefill_speed
from fusionroute.runtime.plan.systems import Request
from fusionroute.runtime.precisions import PRECISIONS
from fusionroute.runtime.tensorrt.library import TARGET as TENSORRT

CUDA = "ort:cuda"

# 8 bits lose next to nothing; then what loses more, and last what only costs memory: see docs/precision.md
PREFERRED = ("int8", "fp8", "int8-wo", "int4", "nvfp4", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Choice:
    """One precision: bytes, tokens/s as (low, expected, high), and the command that exports it, None for a model without experts."""

    precision: str
    memory: Memory
    decode: Range
    prefill: Range
    command: str | None

    @property
    def fits(self) -> bool:
        """Whether the whole system lies in memory."""
        return self.memory.placement == "fits"

    @property
    def runs(self) -> bool:
        """Whether it runs at all."""
        return self.memory.placement != "does not fit"


@dataclass(frozen=True)
class Plan:
    """What was asked for, and a choice for each precision; `recommended`: one of them, None where nothing runs."""

    request: Request
    device: Device
    text: Text
    choices: tuple[Choice, ...]
    recommended: Choice | None

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "estimate": self.basis,
            "system": self.request.title,
            "context": self.request.context,
            "switch_rate": self.text.switch_rate,
            "acceptance": self.text.acceptance,
            "device": {key: value for key, value in asdict(self.device).items() if key not in ("kind", "cores")}
            | {"target": self.device.target},
            "precisions": [of_choice(choice) for choice in self.choices],
            "recommended": self.recommended and {"precision": self.recommended.precision, "command": self.recommended.command},
        }

    @property
    def basis(self) -> str:
        """That it is an estimate, and from what."""
        fit = fit_of(self.device.kind)
        rows = [row for row in measurements(self.device.kind) if row.sure]
        where = {"gpu": f"published measurements on {len({row.device for row in rows})} boards and cards"}
        of = where.get(self.device.kind, "runs of this project on processors")
        return (
            f"An estimate, not a measurement: bytes, the memory's bandwidth and a share of it fitted to {len(rows)} {of}, "
            f"nine in ten of which it meets within {fit.spread - 1:.0%}."
        )


def of_choice(choice: Choice) -> dict[str, Any]:
    """A precision in JSON."""
    memory = choice.memory
    return {
        "precision": choice.precision,
        "fits": choice.fits,
        "placement": memory.placement,
        "experts_in_memory": memory.experts,
        "expert_memory_bytes": memory.expert_memory,
        "weights_bytes": memory.weights,
        "kv_bytes": memory.kv,
        "scratch_bytes": memory.scratch,
        "reserved_bytes": memory.reserved,
        "longest_context": memory.context,
        "decode_tokens_per_second": [round(speed, 2) for speed in choice.decode],
        "prefill_tokens_per_second": [round(speed, 1) for speed in choice.prefill],
        "command": choice.command,
    }


def make_plan(request: Request, device: Device, text: Text, precisions: Sequence[str] | None) -> Plan:
    """Plan all precisions that a device has, or those named. Raises InputError for what it lacks."""
    if not 2 <= request.context <= request.most_context:
        raise InputError(
            f"A context of {request.context} tokens is outside what the model takes: give --context 2 to {request.most_context}."
        )
    for name, share in (("--switch-rate", text.switch_rate), ("--acceptance", text.acceptance)):
        if share is not None and not 0 <= share <= 1:
            raise InputError(f"{name} {share:g} is no share of the tokens: give a number from 0 to 1.")
    if device.target == TENSORRT and request.targets and TENSORRT not in request.targets and CUDA in request.targets:
        device = replace(device, export=CUDA)
    known = [name for name in request.precisions(device.target) if has_types(device, name)]
    if not known:
        raise InputError(
            f"The bundle has nothing for {device.title}, and its models have no known sizes: export it with --target {device.export}, "
            "or plan with --family and --size."
        )
    for precision in precisions or ():
        if precision not in known:
            raise InputError(f"There is no precision '{precision}' for {device.title} ({device.export}): use one of {', '.join(known)}.")
    choices = tuple(choice_of(request, device, text, precision) for precision in precisions or known)
    return Plan(request, device, text, choices, recommended(choices))


def has_types(device: Device, precision: str) -> bool:
    """Whether a GPU has the types of a precision; one whose compute capability nobody gave may have all."""
    record = PRECISIONS.get(precision)
    return device.sm is None or record is None or record.least_sm <= device.sm


def choice_of(request: Request, device: Device, text: Text, precision: str) -> Choice:
    """One precision."""
    system = request.build(device.target, precision)
    memory = memory_of(system, device, request.context)
    decode = decode_speed(system, device, memory, request.context, text)
    return Choice(precision, memory, decode, prefill_speed(system, device), export_command(request, device, precision))


def recommended(choices: Sequence[Choice]) -> Choice | None:
    """The first of `PREFERRED` that fits; else the narrowest that runs with evicting experts; else None."""
    ranked = sorted(choices, key=lambda choice: PREFERRED.index(choice.precision) if choice.precision in PREFERRED else len(PREFERRED))
    fitting = [choice for choice in ranked if choice.fits]
    return next(iter(fitting or sorted((choice for choice in choices if choice.runs), key=lambda choice: choice.memory.weights)), None)


def export_command(request: Request, device: Device, precision: str) -> str | None:
    """The command that exports it, with folders named after the models; None without experts, which is no system."""
    if not request.experts:
        return None
    experts = "".join(f" --expert {name}=experts/{name}" for name in request.experts)
    base = f" --base BASE --shared-base{f' --rank {request.rank}' if request.rank else ''}" if request.shared else ""
    return (
        f"fusionroute export --family {request.family} --router router{experts}{base} --target {device.export} "
        f"--precision {precision} --max-seq-len {request.context}"
    )
