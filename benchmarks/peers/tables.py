"""The measured figures as Markdown, written into docs/performance.md between two marks."""

from pathlib import Path
from typing import Any

from benchmarks.peers.comparison import DECODED, DEFAULT, JUDGED, LONG, PROMPT, Row
from benchmarks.peers.environments import OURS

BEGIN, END = "<!-- measured: renewed by python -m benchmarks.peers --write -->", "<!-- end of what was measured -->"


def ratio(times: float) -> str:
    """How many times as fast ours is; in bold where it is slower."""
    return f"{times:.2f}" if times >= 1 else f"**{times:.2f}**"


def alone(rows: list[Row]) -> str:
    """One model, one precision: our row first."""
    lines = [
        f"| runtime | form | decode, tokens/s | ours is × | prefill of {LONG}, tokens/s | ours is × | peak memory, MB | perplexity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = row["runtime"] == OURS
        decode, prefill = ("", "") if own else (ratio(row["decode_times"]), ratio(row["prefill_times"]))
        lines.append(
            f"| {row['runtime']} | {row['form']} | {row['tokens_per_second']:.1f} | {decode} | {row['prefill_per_second']:.0f} | {prefill} "
            f"| {row['peak'] / 1e6:.0f} | {row['perplexity']:.2f} |"
        )
    return "\n".join(lines)


def fused(rows: list[Row]) -> str:
    """Fused systems of all precisions."""
    lines = [
        "| precision | runtime | settings | decode, tokens/s | ours is × | prefill, tokens/s | ours is × | same text | peak memory, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = row["runtime"] == OURS
        decode, prefill = ("", "") if own else (ratio(row["decode_times"]), ratio(row["prefill_times"]))
        alike = "" if own else f"{row['alike']:.0%}"
        best = " (best)" if row["settings"] == max(row["swept"], key=row["swept"].__getitem__) else ""
        lines.append(
            f"| {row['precision']} | {row['runtime']} | {row['settings']}{best} | {row['tokens_per_second']:.1f} | {decode} "
            f"| {row['prefill_per_second']:.0f} | {prefill} | {alike} | {row['peak'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def swept_settings(rows: list[Row]) -> str:
    """Tokens/s of the workaround by its settings and by precision."""
    swept_by_precision = {row["precision"]: row["swept"] for row in rows}
    settings = next(iter(swept_by_precision.values()))
    lines = [f"| settings of each model | {' | '.join(swept_by_precision)} |", "|---|" + "---|" * len(swept_by_precision)]
    lines += [f"| {name} | {' | '.join(f'{speeds[name]:.1f}' for speeds in swept_by_precision.values())} |" for name in settings]
    return "\n".join(lines)


def render(result: dict[str, Any]) -> str:
    """All tables."""
    machine, everything = result["machine"], [*result["alone"], *result["fused"]]
    precisions = dict.fromkeys(row["precision"] for row in result["alone"])
    changes = {row["precision"]: row["changes"] for row in result["fused"] if row["runtime"] == OURS}
    parts = [
        f"{machine['cpu']}, {machine['threads']} threads ({machine['features'] or 'no wide instructions'}), {machine['memory'] / 1e9:.0f} GB, "
        f"Python {machine['python']}. Medians of {result['rounds']} rounds in turns. While others worked, no process used more than "
        f"{max(row['idle'] for row in everything):.1%} of a core.",
        "### One model",
        f"{DECODED} tokens behind a prompt of {PROMPT}; perplexity of {JUDGED * LONG} tokens. “Ours is ×”: how many times as long the other took.",
    ]
    for precision in precisions:
        parts += [f"**{precision}**", alone([row for row in result["alone"] if row["precision"] == precision])]
    if result["fused"]:
        listed = ", ".join(f"{count:.1f} ({precision})" for precision, count in changes.items())
        parts += [
            "### Fused",
            f"Router and one of {machine['experts']} experts for every token, λ = {machine['lambda']}; the expert changed {listed} times in a text.",
            fused(result["fused"]),
            f"The workaround's settings, tokens/s of few rounds (“{DEFAULT}” are onnxruntime-genai's):",
            swept_settings(result["fused"]),
        ]
    packages = "; ".join(f"{name}: {', '.join(requirements)}" for name, requirements in result["packages"].items())
    return "\n\n".join([*parts, f"Packages: {packages}."])


def write_page(page: Path, result: dict[str, Any]) -> None:
    """Replace the part of the page between its marks."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} has no place for what was measured: it needs the lines {BEGIN} and {END}.")
    page.write_text(f"{before}{BEGIN}\n\n{render(result)}\n\n{END}{after}", encoding="utf-8")
