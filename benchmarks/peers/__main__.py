"""The same models and prompts in other runtimes, each in its own environment, beside ours. Writes JSON and tables.

python -m benchmarks.peers --router SYSTEM/router --expert NAME=SYSTEM/experts/NAME … --bundle BUNDLE --work WORK [--write]

BUNDLE is the system exported for ort:cpu in fp32, int8 and int4. The first run fills WORK with environments, models and
perplexities (an hour, about 15 GB); later runs take a few minutes. Run this on an otherwise idle machine. --write
renews the tables and the chart of docs/performance.md; the chart needs the extra `bench`.
"""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.peers.comparison import Comparison
from benchmarks.peers.environments import ENVIRONMENTS, OURS
from benchmarks.peers.tables import render, write_page
from fusionroute.fr_export.commands.options import parse_experts
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.machine import cores, processor

DOCS = Path(__file__).resolve().parents[2] / "docs"
# features that decide which kernels run
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def describe_machine(threads: int, bundle: Path) -> dict[str, Any]:
    """What the figures depend on."""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in processor())}
    flags = fields.get("flags", "").split()
    manifest = Bundle.open(bundle).manifest
    return {
        "cpu": fields.get("model name", platform.machine()),
        "features": ", ".join(name for name in CPU_FEATURES if name in flags),
        "threads": threads,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "experts": len(manifest.experts),
        "lambda": manifest.lam,
    }


def main(
    router: Annotated[Path, typer.Option(help="Router checkpoint, a Llama with its routing head beside it.")],
    expert: Annotated[list[str], typer.Option(help="NAME=SRC; repeat per expert, in the order of the bundle's.")],
    bundle: Annotated[Path, typer.Option(help="The same system, exported.")],
    work: Annotated[Path, typer.Option(help="Folder of environments, models and results.")],
    precision: Annotated[str, typer.Option(help="Comma list.")] = "fp32,int8,int4",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count; one more warms up.")] = 7,
    fused: Annotated[bool, typer.Option(help="Measure fused systems too.")] = True,
    renew: Annotated[bool, typer.Option("--write", help="Renew docs/performance.md and its chart.")] = False,
) -> None:
    """Compare, write WORK/peers.json, and print its tables."""
    threads = cores()
    experts = {name: Path(source) for name, source in parse_experts(expert)}
    comparison = Comparison(router, experts, bundle, work, threads, rounds)
    for folder in ("env", "models", "log"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    names = precision.split(",")
    result: dict[str, Any] = {
        "machine": describe_machine(threads, bundle),
        "rounds": rounds,
        "packages": {OURS: [f"onnxruntime=={version('onnxruntime')}"], **ENVIRONMENTS},
        "alone": [],
        "fused": [],
    }
    parts = {"alone": comparison.alone, **({"fused": comparison.fused} if fused else {})}
    for part, measure in parts.items():
        for name in names:
            result[part] += measure(name)
            (work / "peers.json").write_text(json.dumps(result, indent=1))
    print(render(result))
    if renew:
        from benchmarks.peers.chart import draw  # matplotlib is in the extra `bench`

        write_page(DOCS / "performance.md", result)
        draw(result, DOCS / "performance.png")


if __name__ == "__main__":
    typer.run(main)
