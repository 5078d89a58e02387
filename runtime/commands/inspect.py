"""`python -m runtime inspect`: what is inside a bundle."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.tensorrt.library import NAMES


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder that export.py wrote.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file and compare with the manifest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Show models, precisions and sizes of a bundle; with --verify, check every hash."""
    opened = Bundle.open(bundle)
    if verify:
        opened.verify()
    manifest = opened.manifest
    if as_json:
        print(json.dumps(manifest.model_dump() | {"verified": verify}), flush=True)
        return
    console = Console(highlight=False)
    total = sum(file.bytes for file in manifest.files.values())
    console.print(f"{bundle}: {manifest.family}, format {manifest.format}, {len(manifest.files)} files, {total / 1e6:,.1f} MB")
    curve = manifest.lam_curve
    tuning = f" (tuned: accuracy {max(accuracy for _, accuracy in curve):.1%} on the validation split)" if curve else ""
    console.print(
        f"fusion {manifest.fusion}, λ = {manifest.lam}{tuning}; context {manifest.max_seq_len} tokens; vocabulary {manifest.vocab_size}; "
        f"{'tokenizer' if 'tokenizer.json' in manifest.files else 'token ids only'}"
        f"{', chat template' if 'chat_template.jinja' in manifest.files else ''}"
    )
    models = Table(title="Models", title_justify="left")
    widths = sorted({variant.cache_width for variant in manifest.variants})
    cache_column = "KV bytes per token" + (" (half precision, fp32)" if len(widths) > 1 else "")
    for column in ("model", "role", "parameters", "layers", cache_column):
        models.add_column(column, justify="left" if column in ("model", "role") else "right")
    for number, model in enumerate(manifest.models):
        values = 2 * model.layers * model.kv_heads * model.head_size
        per_token = " / ".join(f"{values * width:,}" for width in widths)
        models.add_row(model.name, "expert" if number else "router", f"{model.parameters:,}", str(model.layers), per_token)
    variants = Table(title="Precisions", title_justify="left")
    for column in ("target", "precision", "bits/weight", "graphs"):
        variants.add_column(column)
    for variant in manifest.variants:
        variants.add_row(variant.target, variant.precision, f"{variant.bits_per_weight:.2f}", ", ".join(variant.graphs.values()))
    console.print(models)
    console.print(variants)
    if any(variant.engines for variant in manifest.variants):
        engines = Table(title="Engines", title_justify="left")
        for column in ("library", "version", "GPUs", "precision", "size"):
            engines.add_column(column, justify="right" if column == "size" else "left")
        for variant in manifest.variants:
            for built in variant.engines:
                size = sum(manifest.files[path].bytes for path in built.engines.values())
                where = ", ".join(f"sm{sm}" for sm in built.sms)
                engines.add_row(NAMES[built.flavour], built.version, where, variant.precision, f"{size / 1e6:,.1f} MB")
        console.print(engines)
    if verify:
        console.print(f"All {len(manifest.files)} files have the hashes of the manifest.")
