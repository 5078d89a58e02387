"""What the flags --target and --precision name: targets, the GPUs behind `rtx:`, and precisions. Needs no torch."""

import math
from pathlib import Path

import typer

from fusionroute.fr_export.families import Family
from fusionroute.runtime.commands.options import names
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.kv_precisions import KV_PRECISIONS, KvName, refusal
from fusionroute.runtime.precisions import CPU, PRECISIONS, exported_for
from fusionroute.runtime.tensorrt.library import parse_sms

# as the command line spells them → what they are for
TARGET_HELP = {
    "ort": "ONNX Runtime on CPU",
    "ort:cuda": "ONNX Runtime on GPUs",
    "portable": "Optimum",
    "tensorrt": "graphs for TensorRT",
    "tensorrt:10.3": "graphs for JetPack 6",
    "rtx[:sm86+sm89+sm120]": "graphs and TensorRT-RTX engines",
}
ALIASES = {"ort": "ort:cpu", "rtx": "tensorrt"}
PAIRED = ("ort:cpu", "ort:cuda", "tensorrt", "tensorrt:10.3")
SMS = (86, 89, 120)  # what engines are built for where no GPUs are named: GeForce RTX 30, 40 and 50


def parse_targets(text: str) -> tuple[str, ...]:
    """Comma list of targets, without repetitions. `ort` means `ort:cpu`, and `rtx` the graphs of `tensorrt`."""
    targets = tuple(dict.fromkeys(ALIASES.get(without_gpus(name), name) for name in names(text)))
    for target in targets:
        if not exported_for(target):
            known = ", ".join((*TARGET_HELP, "ort:cpu"))
            raise typer.BadParameter(f"unknown target '{target}'; this version exports {known}", param_hint="--target")
    return targets


def without_gpus(name: str) -> str:
    """A target without the GPUs behind `rtx:`."""
    return "rtx" if name.startswith("rtx:") else name


def parse_gpus(text: str) -> tuple[int, ...]:
    """The compute capabilities in `rtx:sm86+sm89` among the targets: `SMS` for a plain `rtx`, none without it."""
    sms: list[int] = []
    for name in names(text):
        if without_gpus(name) == "rtx":
            _, colon, gpus = name.partition(":")
            try:
                sms += parse_sms(gpus) if colon else SMS
            except InputError as error:
                raise typer.BadParameter(str(error).rstrip("."), param_hint="--target") from error
    return tuple(dict.fromkeys(sms))


def parse_precisions(text: str | None, targets: tuple[str, ...], family: Family) -> tuple[str, ...]:
    """Comma list of precisions, or the family's defaults. Each is exported for every target that has it."""
    if text is None:
        defaults = ((target, name) for target in targets for name in family.precisions.get(target, family.precisions["other"]))
        return tuple(dict.fromkeys(name for target, name in defaults if name in exported_for(target)))
    precisions = names(text)
    check_precisions(precisions, targets)
    return precisions


def check_precisions(precisions: tuple[str, ...], targets: tuple[str, ...]) -> None:
    """Refuse a precision that no target has, and a target that has none of the precisions."""
    known = dict.fromkeys(precision for target in targets for precision in exported_for(target))
    for precision in precisions:
        if precision not in known:
            raise typer.BadParameter(
                f"unknown precision '{precision}' for {' and '.join(targets)}; expected {', '.join(known)}", param_hint="--precision"
            )
    for target in targets:
        if not set(precisions) & set(exported_for(target)):
            raise typer.BadParameter(
                f"{target} has no precision {' or '.join(precisions)}; name one of {', '.join(exported_for(target))} too, "
                "or leave the target out",
                param_hint="--precision",
            )


def check_shared_base(targets: tuple[str, ...], adapters_only: bool) -> None:
    """Refuse `--shared-base` for targets that have no graph for a pair of models, or only for those of adapters."""
    if others := [target for target in targets if target not in PAIRED]:
        raise typer.BadParameter(
            f"router and experts share no graph for {' and '.join(others)}; leave it out, or export it without --shared-base",
            param_hint="--shared-base / --target",
        )
    if not adapters_only and (others := [target for target in targets if target != CPU]):
        raise typer.BadParameter(
            f"only {CPU} has graphs for experts that are approximated, or stand apart; leave {' and '.join(others)} out, or export "
            "adapters of one base with --shared-base alone",
            param_hint="--shared-base / --target",
        )


def parse_budget(shared_base: bool, rank: int | None, bits: float | None) -> tuple[int | None, float | None] | None:
    """The ranks, or the bits per weight, of the factors that approximate full fine-tunes; None where neither is named."""
    if rank is None and bits is None:
        return None
    hint = "--rank / --delta-bits"
    if not shared_base:
        raise typer.BadParameter("factors are of models that share one base; add --shared-base, or leave it out", param_hint=hint)
    if rank is not None and bits is not None:
        raise typer.BadParameter("both name the size of the factors; leave one of them out", param_hint=hint)
    if bits is not None and not 0 < bits < math.inf:
        raise typer.BadParameter(f"{bits} is not a number of bits above 0", param_hint="--delta-bits")
    return rank, bits


def check_calibration(source: str, precisions: tuple[str, ...], targets: tuple[str, ...]) -> None:
    """Refuse `--calibration none` where a precision cannot do without it."""
    for precision in precisions if source == "none" else ():
        for target in targets:
            if target in PRECISIONS[precision].calibrated_on:
                raise typer.BadParameter(
                    f"{precision} for {target} needs the scales of calibration; leave out --calibration none, or name other precisions",
                    param_hint="--calibration",
                )


def check_kv(kv: KvName | None, targets: tuple[str, ...], calibration: str) -> None:
    """Refuse a precision of keys and values that a target does not have, or whose scales would be unknown."""
    if kv is None:
        return
    if (reason := refusal(kv, targets)) is not None:
        raise typer.BadParameter(reason, param_hint="--kv / --target")
    if calibration == "none" and KV_PRECISIONS[kv].quantised:
        raise typer.BadParameter(
            f"{kv} needs the scales of calibration; leave out --calibration none, or name fp32", param_hint="--kv / --calibration"
        )


def parse_compare(text: str | None) -> int | None:
    """`none` → 0 tokens, a number of tokens → that, None → the default."""
    if text is None or text == "none":
        return None if text is None else 0
    if not text.isdecimal() or int(text) < 2:
        raise typer.BadParameter(f"'{text}' is neither 'none' nor a number of tokens from 2", param_hint="--compare")
    return int(text)


def default_folder(family: Family) -> Path:
    """Where a bundle goes that is not told where to go."""
    return Path("dist") / family.name
