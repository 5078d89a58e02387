"""The figures as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from fusionroute.runtime.tables import tables

COLUMNS = (
    "precision", "row", "first token ms", "tokens/s", "× first", "p50 ms", "p95 ms", "p99 ms", "own ms", "switches", "catch-ups", "longest", "MB/token",
    "GB/s", "of memory", "accepted",
)  # fmt: skip


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row's cells, in the units of COLUMNS."""
    lengths, read, rate, share = row["catch_ups"], row["weight_bytes_per_token"], row["bytes_per_second"], row["bandwidth_share"]
    return (
        row["precision"],
        row["system"],
        f"{row['first_token'] * 1e3:,.1f}",
        f"{row['tokens_per_second']:,.1f}",
        f"{row['times_first']:.2f}",
        *(f"{row[name] * 1e3:,.2f}" for name in ("p50", "p95", "p99")),
        "–" if row["own"] is None else f"{row['own'] * 1e3:.2f}",
        str(row["switches"]),
        str(len(lengths)),
        str(max(lengths, default=0)),
        "–" if read is None else f"{read / 1e6:,.1f}",
        "–" if rate is None else f"{rate / 1e9:,.2f}",
        "–" if share is None else f"{share:.0%}",
        "–" if row["acceptance_rate"] is None else f"{row['acceptance_rate']:.0%}",
    )


def megabytes(count: int | None) -> str:
    """Bytes as megabytes; a dash where unknown."""
    return "–" if count is None else f"{count / 1e6:,.1f}"


def show(console: Console, result: dict[str, Any]) -> None:
    """Print the rows, what each precision takes, and the notes."""
    console.print(heading(result))
    console.print(*tables(console, "", COLUMNS[:2], COLUMNS[2:], [cells(row) for row in result["rows"]]))
    console.print(*tables(console, "", SIZES[:1], SIZES[1:], [sizes(each) for each in result["precisions"]]))
    console.print(*result["notes"], sep="\n")


SIZES = ("precision", "bits", "KV bytes/token", "bundle MB", "own memory MB", "mapped MB", "GPU MB", "loading s", "perplexity", "top-1")


def sizes(each: dict[str, Any]) -> tuple[str, ...]:
    """A precision's cells, in the units of SIZES."""
    quality = each["quality"] or {}
    perplexity, agreement = quality.get("perplexity_ratio"), quality.get("greedy_agreement")
    return (
        each["name"],
        f"{each['bits_per_weight']:.2f}",
        f"{each['kv_bytes_per_token']:,}",
        megabytes(each["bytes"]),
        megabytes(each["memory"]["anonymous"]),
        megabytes(each["memory"]["mapped"]),
        megabytes(each["device_memory"]),
        f"{each['load_seconds']:.1f}",
        "–" if perplexity is None else f"{perplexity - 1:+.2%}",
        "–" if agreement is None else f"{agreement:.1%}",
    )


def heading(result: dict[str, Any]) -> str:
    """One line: what was measured, on what."""
    machine = result["machine"]
    return (
        f"{result['bundle']} on {result['device']}: {result['prompt_tokens']} tokens of prompt, {result['new_tokens']} new ones, "
        f"median of {result['repeats']}; {machine['cores']} cores, memory read at {machine['read_bandwidth'] / 1e9:.1f} GB/s"
    )
