"""`fusionroute inspect`: what is inside a bundle."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.commands.options import BundleFolder, Debug, Json, Trust, VerifyKey
from fusionroute.runtime.finite_weights import check_finite
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.manifest_file import read_signature
from fusionroute.runtime.prompt import TOKENIZER
from fusionroute.runtime.tables import tables
from fusionroute.runtime.tensorrt.library import NAMES
from fusionroute.runtime.terminal import Terminal, print_json
from fusionroute.runtime.tokenizer_trial import try_tokenizer


def inspect(
    bundle: BundleFolder,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Hash every file, look for weights that are not finite, and try the tokenizer in another process."),
    ] = False,
    verify_key: VerifyKey = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the models, precisions and sizes of a bundle; with --verify or --verify-key, check every hash and try the tokenizer."""
    opened = Bundle.open(bundle, verify_key)
    verify = verify or verify_key is not None
    signed = read_signature(bundle) is not None
    if verify:
        opened.verify()
        check_finite(opened)
        if not trust and TOKENIZER in opened.manifest.files:
            try_tokenizer(opened.read(TOKENIZER), bundle / TOKENIZER)
    manifest = opened.manifest
    if as_json:
        print_json(manifest.model_dump() | {"verified": verify, "signed": signed})
        return
    console = Terminal()
    for line in summary(bundle, manifest):
        console.print(line)
    console.print(*models_table(console, manifest), *precisions_table(console, manifest))
    for variant in manifest.variants:
        console.print(f"{variant.target} {variant.precision}: {', '.join(variant.graph_paths)}")
    if any(variant.engines for variant in manifest.variants):
        console.print(*engines_table(console, manifest))
    if verify:
        console.print(f"All {len(manifest.files)} files have the hashes of the manifest.")
    if signed:
        console.print("The manifest is signed" + (f" by the owner of {verify_key}." if verify_key else "; --verify-key tells by whom."))


def summary(bundle: Path, manifest: Manifest) -> tuple[str, str]:
    """Two lines: the bundle, and how it fuses and reads text."""
    size = sum(file.bytes for file in manifest.files.values())
    curve = manifest.lam_curve
    tuning = f" (tuned: accuracy {max(accuracy for _, accuracy in curve):.1%} on the validation split)" if curve else ""
    tokenizer = "tokenizer" if "tokenizer.json" in manifest.files else "token ids only"
    vacant = [row for row in manifest.rows if row not in manifest.experts]
    rows = f"; rows of the routing head without an expert: {', '.join(vacant)}" if vacant else ""
    template = ", chat template" if "chat_template.jinja" in manifest.files else ""
    return (
        f"{bundle}: {manifest.family}, format {manifest.format}, {len(manifest.files)} files, {size / 1e6:,.1f} MB",
        f"fusion {manifest.fusion}, λ = {manifest.lam}{tuning}; context {manifest.max_seq_len} tokens; "
        f"vocabulary {manifest.vocab_size}; {tokenizer}{template}{rows}",
    )


def models_table(console: Console, manifest: Manifest) -> list[Table]:
    """One row per model, the router first."""
    rows = [
        (model.name, "expert" if number else "router", f"{model.parameters:,}", str(model.layers))
        for number, model in enumerate(manifest.models)
    ]
    return tables(console, "Models", ("model", "role"), ("parameters", "layers"), rows)


def precisions_table(console: Console, manifest: Manifest) -> list[Table]:
    """One row per variant."""
    rows = []
    for variant in manifest.variants:
        kv = {model.name: variant.kv_bytes_per_token(model) for model in manifest.models}
        sizes = [f"{next(iter(kv.values())):,}"] if len(set(kv.values())) == 1 else [f"{name} {size:,}" for name, size in kv.items()]
        spans = {f"{each.tokens:,} tokens in {len(each.layers)} layers" for each in variant.windows.values()}
        rows.append(
            (
                variant.target, variant.precision, f"{variant.bits_per_weight:.2f}", str(variant.kv_bits), "\n".join(sizes),
                "\n".join(sorted(spans)) or "–",
            )
        )  # fmt: skip
    columns = "bits/weight", "KV bits", "KV bytes per token of a model", "windows"
    return tables(console, "Precisions", ("target", "precision"), columns, rows)


def engines_table(console: Console, manifest: Manifest) -> list[Table]:
    """One row per set of engines that was built from a variant."""
    rows = []
    for variant in manifest.variants:
        for built in variant.engines:
            total = sum(manifest.files[path].bytes for path in built.engines.values())
            gpus = ", ".join(f"sm{sm}" for sm in built.sms)
            rows.append((NAMES[built.flavour], built.version, gpus, variant.precision, f"{total / 1e6:,.1f} MB"))
    return tables(console, "Engines", ("library", "version", "GPUs", "precision"), ("size",), rows)
