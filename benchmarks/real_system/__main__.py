"""`python -m benchmarks.real_system --base SRC --work DIR [--piece NAME]`: make a real system, and measure it.

Pieces are data, math, code, instruction, router, direct, evaluate and report, or all of them, in that order. Each goes
on where an interrupted one stopped, and does nothing where it is done.
"""

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from benchmarks.real_system.workshop import Budget, Workshop

Piece = Literal["data", "math", "code", "instruction", "router", "direct", "evaluate", "report", "all"]
PROMPTS = 150  # per domain
DOCS = Path(__file__).parents[2] / "docs"


def main(
    base: Annotated[str, typer.Option(help="SmolLM2-135M-Instruct, or another small instruct model: a folder or hub id.")],
    work: Annotated[Path, typer.Option(help="Folder of data, adapters, bundles and results.")],
    piece: Annotated[Piece, typer.Option(help="What to do.")] = "all",
    prompts: Annotated[int, typer.Option(min=2, help="Test prompts per domain.")] = PROMPTS,
    steps_scale: Annotated[float, typer.Option(min=0.0, help="Multiplies all training steps, for a quick try.")] = 1.0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that answer prompts.")] = 2,
) -> None:
    """Train three LoRA experts and a LoRA router of one base, export them, and compare the methods."""
    workshop = Workshop(base, work.resolve(), Budget().scaled(steps_scale))
    for name in get_args(Piece)[:-1] if piece == "all" else (piece,):
        run(name, workshop, prompts, jobs)


def run(piece: str, workshop: Workshop, prompts: int, jobs: int) -> None:
    """One piece."""
    if piece == "data":
        workshop.write_data()
    elif piece == "router":
        workshop.train_router()
    elif piece == "direct":
        workshop.train_direct()
    elif piece == "evaluate":
        from benchmarks.real_system.measure import Measurement

        Measurement(workshop, prompts, jobs).run()
    elif piece == "report":
        from benchmarks.real_system.report import write_tables

        write_tables(workshop.folder, DOCS / "real-system.md")
    else:
        workshop.train_expert(piece)


if __name__ == "__main__":
    typer.run(main)
