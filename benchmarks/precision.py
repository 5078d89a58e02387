"""What each precision loses on a real system, on text it was not calibrated on.

Writes precision.json and prints a table.

python -m benchmarks.precision --router SYSTEM/router --expert NAME=SYSTEM/experts/NAME … --out DIR     SmolLM2-135M: an hour on one core

The text is Python's language reference, or a file of yours. The reference is plain torch in fp32; its logits of 20,000
tokens and a vocabulary of 49,152 take 4 GB of memory.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.against_torch import compare_both, export_uncompared, torch_references
from benchmarks.real_text import passages
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.commands.options import parse_experts
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.verify.bounds import misses
from fusionroute.runtime.precisions import PRECISIONS

CONTEXT = 1024  # tokens


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
            request = Request(FAMILIES[family], router, experts, names, ("ort:cpu",), bundle, max_seq_len=CONTEXT)
            export_uncompared(request, stages)
        system = System.open(FAMILIES[family], router, experts, max_seq_len=CONTEXT)
        texts = passages(system, text, tokens)
        references = torch_references(system, bundle, texts, stages)
        figures = {}
        for name in names:
            with stages.stage(f"measuring {name}", sum(map(len, texts)) + decode) as advance:
                figures[name] = compare_both(str(bundle), name, texts, references, advance, decode)
                figures[name]["missed"] = misses("ort:cpu", name, figures[name]) if name in PRECISIONS else []
            (out / "precision.json").write_text(json.dumps(figures, indent=1))
    table = Table("precision", "read", "perplexity", "KL mean", "KL p99", "top-1", "sure", "routing")
    for name, compared in figures.items():
        for reading in ("chunks", "decode"):
            own = compared[reading]
            shares = (f"{own[key]:.2%}" for key in ("greedy_agreement", "sure_agreement", "routing_agreement"))
            table.add_row(name, reading, f"{own['perplexity_ratio'] - 1:+.2%}", f"{own['kl_mean']:.1e}", f"{own['kl_p99']:.1e}", *shares)
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
