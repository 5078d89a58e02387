"""The report of an export: report.json, and the tables on the terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fusionroute.fr_export.bundle.variant import stored_weights
from fusionroute.fr_export.checkpoints.source_report import SourceReport
from fusionroute.fr_export.precision.rank_budget import Ranks
from fusionroute.fr_export.verify.bounds import misses
from fusionroute.fr_export.verify.hints import hint
from fusionroute.fr_export.verify.measure import obstacle
from fusionroute.runtime.manifest import Engines, Manifest, Variant
from fusionroute.runtime.tables import size, tables
from fusionroute.runtime.tensorrt.library import NAMES as LIBRARIES

NAME = "report.json"


def build_report(
    manifest: Manifest,
    fitted: Sequence[Mapping[str, Any]],
    figures: Mapping[tuple[str, str], dict[str, Any]],
    reason: str | None,
    notes: Sequence[str],
    folder: Path,
    sources: Mapping[str, SourceReport],
    approximated: Mapping[str, Ranks],
) -> dict[str, Any]:
    """The report as plain data, but for its stages.

    `sources` says what each model was made from. `fitted` holds, per variant of the manifest, what fitting reports of
    each model. `figures` and `reason` come from `measure`. `notes` are sentences for the user. `approximated`: experts whose
    factors are not exact.
    """
    return {
        "family": manifest.family,
        "models": [model.name for model in manifest.models],
        "parameters": {model.name: model.parameters for model in manifest.models},
        "max_seq_len": manifest.max_seq_len,
        "vocab_size": manifest.vocab_size,
        "notes": list(notes),
        "sources": [
            {"model": name, "kind": source.kind, "bytes": source.bytes, "dtypes": list(source.dtypes), "notes": list(source.notes)}
            for name, source in sources.items()
        ],
        "variants": [
            describe_variant(variant, manifest, about, figures.get((variant.target, variant.precision)), reason, folder)
            for variant, about in zip(manifest.variants, fitted, strict=True)
        ],
        "approximated": {
            name: {"bits": ranks.bits, "left": ranks.left, "error": ranks.error, "ranks": [min(ranks.of.values()), max(ranks.of.values())]}
            for name, ranks in approximated.items()
        },
        "not_compared": reason,
    }


def describe_variant(
    variant: Variant, manifest: Manifest, fitted: Mapping[str, Any], compared: dict[str, Any] | None, reason: str | None, folder: Path
) -> dict[str, Any]:
    """One variant's entry. `bytes` counts its graphs, every tensor that they read, each once, and the experts' `factors`."""
    graphs = sum((folder / name).stat().st_size for name in variant.graph_paths)
    factors = {} if variant.pair is None else {name: manifest.files[path].bytes for name, path in variant.pair.factors.items()}
    return {
        "target": variant.target,
        "precision": variant.precision,
        "kv": variant.kv,
        "kv_bytes_per_token": {model.name: variant.kv_bytes_per_token(model) for model in manifest.models},
        "bytes": graphs + sum(stored_weights(variant, folder).values()) + sum(factors.values()),
        "factors": factors,
        "bits_per_weight": variant.bits_per_weight,
        "compared": compared,
        "missed": misses(variant.target, variant.precision, compared, variant.kv),
        "not_compared": None if compared else obstacle(variant.target) or reason,
        "calibrated": bool(fitted),
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
    """Print the tables of precisions and stages, and what they mean."""
    console.print(Text(f"{report['family']}: {' + '.join(report['models'])} → {out}"))
    sources = [(each["model"], each["kind"], ", ".join(each["dtypes"]), size(each["bytes"])) for each in report["sources"]]
    console.print(*tables(console, "Sources", ("model", "kind", "dtypes"), ("size",), sources))
    for line in source_notes(report):
        console.print(Text(line))
    variants = report["variants"]
    styles = ["red" if entry["missed"] else "" for entry in variants]
    console.print(*tables(console, "", VARIANT_NAMES, VARIANT_FIGURES, [cells(entry) for entry in variants], styles))
    for entry in variants:
        if entry["missed"]:
            missed = f"{entry['precision']} misses its bound: {'; '.join(entry['missed'])}. To mend it, {hint(entry)}."
            console.print(Text(missed, "red"))
    console.print(explain(report))
    stages = [(each["name"], f"{each['seconds']:.1f}", f"{each['peak_anonymous_mib']:,.0f} MiB") for each in report["stages"]]
    console.print(*tables(console, "Stages", ("stage",), ("seconds", "peak memory"), stages))


VARIANT_NAMES = ("target", "precision")
VARIANT_FIGURES = ("size", "bits", "perplexity", "KL", "top-1", "routing")


def cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """A variant's row, in the units of `VARIANT_FIGURES`."""
    head = (entry["target"], entry["precision"], size(entry["bytes"]), f"{entry['bits_per_weight']:.2f}")
    if entry["compared"] is None:
        return (*head, *["–"] * 4)
    decode = entry["compared"]["decode"]
    ratio = decode["perplexity_ratio"]
    return (
        *head,
        "–" if ratio is None else f"{ratio - 1:+.2%}",
        f"{decode['kl_mean']:.1e}",
        f"{decode['greedy_agreement']:.1%}",
        f"{decode['routing_agreement']:.1%}",
    )


def source_notes(report: dict[str, Any]) -> list[str]:
    """What was done to the sources: one line per note, with the models that it holds for."""
    models: dict[str, list[str]] = {}
    for source in report["sources"]:
        for note in source["notes"]:
            models.setdefault(note, []).append(source["model"])
    return [f"{', '.join(names)}: {note}." for note, names in models.items()]


def explain(report: dict[str, Any]) -> str:
    """The text under the table: what the differences were measured on, and what could not be compared."""
    lines = ["Bits are per weight of a matrix."]
    compared = next((entry["compared"] for entry in report["variants"] if entry["compared"]), None)
    if compared is not None:
        lines.append(
            f"The fused distribution is held against torch in fp32 over {compared['tokens']} tokens, the last of each text read one by one; "
            "KL is a mean in nats."
        )
    for entry in report["variants"]:
        if entry.get("kv"):
            taken = max(entry["kv_bytes_per_token"].values())
            lines.append(f"{entry['precision']} keeps keys and values in {entry['kv']}, {taken:,} bytes per token of a model.")
        if carried := sum(about.get("carried", 0) for about in entry["fitted"].values()):
            lines.append(f"{entry['precision']} took over {carried} matrices of quantised checkpoints as they are.")
        for built in entry["engines"]:
            gpus = ", ".join(f"sm{sm}" for sm in built["sms"])
            total = size(sum(built["bytes"].values()))
            lines.append(f"Engines of {entry['precision']}: {total} by {LIBRARIES[built['flavour']]} {built['version']} for {gpus}.")
    for name, ranks in report["approximated"].items():
        least, most = ranks["ranks"]
        lines.append(
            f"Factors of {name}: rank {least} to {most}, {ranks['bits']:.2f} bits per weight of the base; they leave out {ranks['left']:.0%} of "
            f"what it changes, {ranks['error']:.1e} of its products."
        )
    reasons: dict[str, list[str]] = {}
    for entry in report["variants"]:
        if entry["not_compared"]:
            reasons.setdefault(entry["not_compared"], []).append(f"{entry['precision']} for {entry['target']}")
    lines += [f"Not compared with torch: {', '.join(names)} ({reason})." for reason, names in reasons.items()]
    return " ".join(lines)
