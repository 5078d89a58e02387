"""What half precision throughout (`--target ort:cuda`) loses on a real system, without a GPU. Writes a JSON file and prints a table.

python benchmarks/half.py --router SYSTEM/router --expert NAME=SYSTEM/experts/NAME … --out DIR

The graphs are exported as for a GPU and computed on the CPU with the GPU's rounding (fr_export/verify/half_on_cpu.py). The text is Python's own language
reference, which every Python brings (`pydoc_data.topics`), or a file of yours. The reference is plain torch in fp32; logits of 20,000 tokens
of a vocabulary of 49,152 take 4 GB of memory.
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
from fusionroute.fr_export.verify.compare import LONGEST, compare
from fusionroute.fr_export.verify.half_on_cpu import emulate
from fusionroute.fr_export.verify.torch_reference import reference
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.text import Text

TOP_1 = {"fp16": 0.995, "bf16": 0.97}  # bf16's rounding alone moves the fused argmax on about 2 % of the tokens


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
            request = Request(FAMILIES[family], router, experts, tuple(TOP_1), ("ort:cuda",), bundle, max_seq_len=LONGEST)
            export(request, stages)
            emulate(bundle)
        system = System.open(FAMILIES[family], router, experts, max_seq_len=LONGEST)
        words = text.read_text(encoding="utf-8") if text else "\n\n".join(topics[name] for name in sorted(topics))
        ids = Text.load(system.router.folder / "tokenizer.json").encode(words)[:tokens]
        texts = [ids[start : start + LONGEST] for start in range(0, len(ids), LONGEST)]
        with FusionRuntime.load(bundle) as runtime:
            coefficients = runtime.coefficients(runtime.fusion, runtime.lam)
        with stages.stage("reference in torch", len(system.models)) as advance:
            references = reference(system, texts, coefficients, advance)
        found = {}
        for name, bound in TOP_1.items():
            with stages.stage(f"measuring {name}", len(ids) + min(decode, len(ids))) as advance:
                found[name] = compare(str(bundle), name, texts, references, advance, decode) | {"top_1_bound": bound}
            (out / "half.json").write_text(json.dumps(found, indent=1) + "\n")
    table = Table("throughout", "read", "tokens", "perplexity", "KL mean", "KL p99", "top-1", "bound", "sure", "routing")
    for name, compared in found.items():
        for how, count in (("chunks", len(ids)), ("decode", min(decode, len(ids)))):
            own = compared[how]
            shares = (f"{share:.2%}" for share in (own["greedy_agreement"], TOP_1[name], own["sure_agreement"], own["routing_agreement"]))
            ratio = f"{own['perplexity_ratio'] - 1:+.2%}"
            table.add_row(name, how, f"{count:,}", ratio, f"{own['kl_mean']:.1e}", f"{own['kl_p99']:.1e}", *shares)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
