"""A plan on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text as Styled

from fusionroute.runtime.plan.check import Check
from fusionroute.runtime.plan.plan import Choice, Plan
from fusionroute.runtime.plan.speed import Range
from fusionroute.runtime.tables import size, tables
from fusionroute.runtime.tensorrt.library import TARGET as TENSORRT


def show(console: Console, plan: Plan) -> None:
    """Print what was planned, the table, the recommendation and what the estimate rests on."""
    device, request = plan.device, plan.request
    console.print(Styled(f"{request.title}, context {request.context:,} tokens"))
    console.print(
        Styled(
            f"{device.title}: {size(device.memory)} at {device.bandwidth / 1e9:,.4g} GB/s, of which the system takes "
            f"{size(device.reserved)} and {size(device.free)} are free"
        )
    )
    rows = [row(choice, len(request.experts)) for choice in plan.choices]
    columns = ("weights", "KV", "scratch", "decode, tokens/s", "prefill, tokens/s")
    console.print(*tables(console, "", ("precision", "fits"), columns, rows))
    best = plan.recommended
    if best is None:
        console.print(Styled("Nothing of it runs there: plan fewer experts, --shared-base, a shorter --context, or a larger device."))
    else:
        console.print(Styled(f"Take {best.precision}{':' if best.command else ', of a router with at least one expert.'}"))
        if best.command:
            console.print(*pasted(best.command, console.width - 4), sep="\n", soft_wrap=True)
            if not best.fits and not (device.unified and device.target == TENSORRT):  # where host and GPU share, it is refused
                console.print(Styled(f"and run it with --expert-memory {best.memory.expert_memory >> 20}"))
    drafts = "no drafts" if plan.text.acceptance is None else f"{plan.text.acceptance:.0%} of the drafts right"
    console.print(Styled(f"{plan.basis} Assumed: another expert for {plan.text.switch_rate:.0%} of the tokens, {drafts}."))


def show_checks(console: Console, checks: Sequence[Check]) -> None:
    """Print estimates beside what was measured here."""
    if checks:
        rows = [
            (
                each.precision, f"{each.estimated:.1f}", f"{each.measured:.1f}", f"{each.error:+.0%}", f"{each.switch_rate:.0%}",
                f"{each.bandwidth / 1e9:.1f} GB/s",
            )
            for each in checks
        ]  # fmt: skip
        columns = ("estimated", "measured", "error", "switches", "bandwidth")
        console.print(*tables(console, "Tokens per second of a short run on this machine", ("precision",), columns, rows))


def row(choice: Choice, experts: int) -> tuple[str, ...]:
    """A precision's memory and speed."""
    memory = choice.memory
    placement = "yes" if choice.fits else f"{memory.experts} of {experts} experts" if choice.runs else "no"
    speeds = [span(each) if choice.runs else "–" for each in (choice.decode, choice.prefill)]
    return choice.precision, placement, size(memory.weights), size(memory.kv), size(memory.scratch), *speeds


def span(speed: Range) -> str:
    """A range of tokens per second around what is expected: 12 · 17 · 20."""
    return " · ".join(f"{each:,.3g}" if each < 1000 else f"{each:,.0f}" for each in speed)


def pasted(command: str, width: int) -> list[str]:
    """A command in lines that a shell takes as one."""
    lines = [""]
    for part in command.split(" --"):
        option = part if lines == [""] else f"--{part}"
        if lines[-1] and len(lines[-1]) + 1 + len(option) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {option}".strip()
    return [f"  {line}{end}" for line, end in zip(lines, [" \\"] * (len(lines) - 1) + [""], strict=True)]
