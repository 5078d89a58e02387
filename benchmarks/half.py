"""What half precision in all operators (`--target ort:cuda`) loses on a real system, without a GPU.

Writes half.json and prints a table.

python -m benchmarks.half --router SYSTEM/router --expert NAME=SYSTEM/experts/NAME … --out DIR

The graphs are exported as for a GPU and computed on the CPU with a GPU's rounding (fr_export/verify/half_on_cpu.py).
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
from fusionroute.fr_export.verify.compare import LONGEST
from fusionroute.fr_export.verify.half_on_cpu import compute_half_on_cpu

TOP_1_BOUNDS = {"fp16": 0.995, "bf16": 0.97}  # rounding to bf16 changes the argmax of about 2 % of the tokens


def main(
    router: Annotated[str, typer.Option(help="Router checkpoint.")],
    expert: Annotated[list[str], typer.Option(help="NAME=SRC; repeat per expert.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle and of half.json.")],
    family: Annotated[str, typer.Option(help="Model family.")] = "llama3",
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: Python's language reference.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens read in chunks.")] = 20_480,
    decode: Annotated[int, typer.Option(help="Tokens of them that are also read one by one.")] = 512,
) -> None:
    """Export a system for the GPU and measure fp16 and bf16."""
    experts = dict(parse_experts(expert))
    bundle = out / "bundle"
    stages = Stages(Console(stderr=True))
    with stages.progress:
        if not bundle.exists():
            request = Request(FAMILIES[family], router, experts, tuple(TOP_1_BOUNDS), ("ort:cuda",), bundle, max_seq_len=LONGEST)
            export_uncompared(request, stages)
            compute_half_on_cpu(bundle)
        system = System.open(FAMILIES[family], router, experts, max_seq_len=LONGEST)
        texts = passages(system, text, tokens)
        read = {"chunks": sum(map(len, texts)), "decode": min(decode, sum(map(len, texts)))}
        references = torch_references(system, bundle, texts, stages)
        figures = {}
        for name, bound in TOP_1_BOUNDS.items():
            with stages.stage(f"measuring {name}", sum(read.values())) as advance:
                figures[name] = compare_both(str(bundle), name, texts, references, advance, decode) | {"top_1_bound": bound}
            (out / "half.json").write_text(json.dumps(figures, indent=1) + "\n")
    table = Table("throughout", "read", "tokens", "perplexity", "KL mean", "KL p99", "top-1", "bound", "sure", "routing")
    for name, bound in TOP_1_BOUNDS.items():
        for reading, count in read.items():
            own = figures[name][reading]
            shares = (f"{share:.2%}" for share in (own["greedy_agreement"], bound, own["sure_agreement"], own["routing_agreement"]))
            ratio = f"{own['perplexity_ratio'] - 1:+.2%}"
            table.add_row(name, reading, f"{count:,}", ratio, f"{own['kl_mean']:.1e}", f"{own['kl_p99']:.1e}", *shares)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
