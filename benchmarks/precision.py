"""What each precision loses on a real system, on text that it was not made with. Writes a JSON file and prints a table.

python benchmarks/precision.py --router SYSTEM/router --expert NAME=SYSTEM/experts/NAME … --out DIR     SmolLM2-135M: an hour on one core

The text is Python's own language reference, which every Python brings (`pydoc_data.topics`), or a file of yours. The reference is plain
torch in fp32; logits of 20,000 tokens of a vocabulary of 49,152 take 4 GB of memory.
"""

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.commands.export import parse_experts
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.verify import measure
from fusionroute.fr_export.verify.bounds import misses
from fusionroute.fr_export.verify.compare import LONGEST, compare
from fusionroute.fr_export.verify.torch_reference import reference
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.precisions import PRECISIONS
from fusionroute.runtime.text import Text


def windows(system: System, file: Path | None, tokens: int) -> list[list[int]]:
    """The first `tokens` tokens of the text, in pieces."""
    text = file.read_text(encoding="utf-8") if file else "\n\n".join(topics[name] for name in sorted(topics))
    ids = Text.load(system.router.folder / "tokenizer.json").encode(text)[:tokens]
    return [ids[start : start + LONGEST] for start in range(0, len(ids), LONGEST)]


def main(
    router: Annotated[str, typer.Option(help="Router checkpoint.")],
    expert: Annotated[list[str], typer.Option(help="NAME=SRC; repeat per expert.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle and of precision.json.")],
    family: Annotated[str, typer.Option(help="Model family.")] = "llama3",
    precision: Annotated[str, typer.Option(help="Comma list.")] = "fp32,fp16,bf16,int8",
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: Python's language reference.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens read in chunks.")] = 20_480,
    decode: Annotated[int, typer.Option(help="Tokens of them that are also read one by one.")] = 4096,
) -> None:
    """Export a system in several precisions and measure them."""
    console, experts, names = Console(stderr=True), dict(parse_experts(expert)), tuple(precision.split(","))
    bundle = out / "bundle"
    stages = Stages(console)
    with stages.progress:
        if not bundle.exists():
            measure.REFERENCE_LIMIT = 0  # the export's own comparison is too short for this
            export(Request(FAMILIES[family], router, experts, names, ("ort:cpu",), bundle, max_seq_len=1024), stages)
        system = System.open(FAMILIES[family], router, experts, max_seq_len=1024)
        texts = windows(system, text, tokens)
        with FusionRuntime.load(bundle) as runtime:
            coefficients = runtime.coefficients(runtime.fusion, runtime.lam)
        with stages.stage("reference in torch", len(system.models)) as advance:
            references = reference(system, texts, coefficients, advance)
        found = {}
        for name in names:
            with stages.stage(f"measuring {name}", sum(map(len, texts)) + decode) as advance:
                found[name] = compare(str(bundle), name, texts, references, advance, decode)
                found[name]["missed"] = misses("ort:cpu", name, found[name]) if name in PRECISIONS else []
            (out / "precision.json").write_text(json.dumps(found, indent=1))
    table = Table("precision", "read", "perplexity", "KL mean", "KL p99", "top-1", "sure", "routing")
    for name, compared in found.items():
        for how in ("chunks", "decode"):
            own = compared[how]
            shares = (f"{own[key]:.2%}" for key in ("greedy_agreement", "sure_agreement", "routing_agreement"))
            table.add_row(name, how, f"{own['perplexity_ratio'] - 1:+.2%}", f"{own['kl_mean']:.1e}", f"{own['kl_p99']:.1e}", *shares)
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
