"""The report of an export: report.json, and the tables on the terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table

from fusionroute.fr_export.bundle.variant import weight_files
from fusionroute.fr_export.verify.bounds import misses
from fusionroute.fr_export.verify.measure import obstacle
from fusionroute.runtime.manifest import Engines, Manifest, Variant
from fusionroute.runtime.tensorrt.library import NAMES as LIBRARIES

NAME = "report.json"


def build_report(
    manifest: Manifest,
    fitted: Sequence[Mapping[str, Any]],
    figures: Mapping[tuple[str, str], dict[str, Any]],
    reason: str | None,
    notes: Sequence[str],
    folder: Path,
) -> dict[str, Any]:
    """The report as plain data, but for its stages.

    `fitted` holds, per variant of the manifest, what fitting reports of each model. `figures` and `reason` come from
    `measure`. `notes` are sentences for the user.
    """
    return {
        "family": manifest.family,
        "models": [model.name for model in manifest.models],
        "parameters": {model.name: model.parameters for model in manifest.models},
        "max_seq_len": manifest.max_seq_len,
        "vocab_size": manifest.vocab_size,
        "notes": list(notes),
        "variants": [
            describe_variant(variant, manifest, about, figures.get((variant.target, variant.precision)), reason, folder)
            for variant, about in zip(manifest.variants, fitted, strict=True)
        ],
        "not_compared": reason,
    }


def describe_variant(
    variant: Variant, manifest: Manifest, fitted: Mapping[str, Any], compared: dict[str, Any] | None, reason: str | None, folder: Path
) -> dict[str, Any]:
    """One variant's entry. `bytes` counts its graphs and every weight file that they read, each once."""
    files = {*weight_files(variant, folder), *(folder / name for name in variant.graphs.values())}
    return {
        "target": variant.target,
        "precision": variant.precision,
        "bytes": sum(path.stat().st_size for path in files),
        "bits_per_weight": variant.bits_per_weight,
        "compared": compared,
        "missed": misses(variant.target, variant.precision, compared),
        "not_compared": None if compared else obstacle(variant) or reason,
        "fitted": dict(fitted),
        "engines": [describe_engines(engines, manifest) for engines in variant.engines],
    }


def describe_engines(engines: Engines, manifest: Manifest) -> dict[str, Any]:
    """The library, the GPUs (compute capabilities) and the sizes in bytes of a variant's engines."""
    return {
        "flavour": engines.flavour,
        "version": engines.version,
        "sms": engines.sms,
        "bytes": {name: manifest.files[path].bytes for name, path in engines.engines.items()},
    }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write report.json into a bundle folder."""
    (folder / NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def show_report(console: Console, report: dict[str, Any], out: Path) -> None:
    """Print the tables of precisions and stages."""
    title = f"{report['family']}: {' + '.join(report['models'])} → {out}"
    precisions = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("target", "precision", "size", "bits", "perplexity", "KL", "top-1", "routing"):
        precisions.add_column(column, justify="left" if column in ("target", "precision") else "right", no_wrap=True)
    for entry in report["variants"]:
        compared = entry["compared"]
        head = (entry["target"], entry["precision"], size(entry["bytes"]), f"{entry['bits_per_weight']:.2f}")
        if compared is None:
            precisions.add_row(*head, *["–"] * 4)
            continue
        decode = compared["decode"]
        ratio = decode["perplexity_ratio"]
        precisions.add_row(
            *head,
            "–" if ratio is None else f"{ratio - 1:+.2%}",
            f"{decode['kl_mean']:.1e}",
            f"{decode['greedy_agreement']:.1%}",
            f"{decode['routing_agreement']:.1%}",
            style="red" if entry["missed"] else None,
        )
    stages = Table(title="Stages", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("stage", "seconds", "peak memory"):
        stages.add_column(column, justify="left" if column == "stage" else "right")
    for stage in report["stages"]:
        stages.add_row(stage["name"], f"{stage['seconds']:.1f}", f"{stage['peak_anonymous_mib']:,.0f} MiB")
    missed = [
        f"[red]{entry['precision']} misses its bound: {'; '.join(entry['missed'])}." for entry in report["variants"] if entry["missed"]
    ]
    console.print(Group(precisions, *missed, explain(report), stages))


def explain(report: dict[str, Any]) -> str:
    """The text under the table: what the differences were measured on, and what could not be compared."""
    lines = ["Bits are per weight of a matrix."]
    compared = next((entry["compared"] for entry in report["variants"] if entry["compared"]), None)
    if compared is not None:
        lines.append(
            f"The fused distribution is held against torch in fp32 over {compared['tokens']} tokens, read in chunks and the last ones one by one; KL is a mean in nats."
        )
    for entry in report["variants"]:
        for built in entry["engines"]:
            gpus = ", ".join(f"sm{sm}" for sm in built["sms"])
            total = size(sum(built["bytes"].values()))
            lines.append(f"Engines of {entry['precision']}: {total} by {LIBRARIES[built['flavour']]} {built['version']} for {gpus}.")
    reasons: dict[str, list[str]] = {}
    for entry in report["variants"]:
        if entry["not_compared"]:
            reasons.setdefault(entry["not_compared"], []).append(f"{entry['precision']} for {entry['target']}")
    lines += [f"Not compared with torch: {', '.join(names)} ({reason})." for reason, names in reasons.items()]
    return " ".join(lines)


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
