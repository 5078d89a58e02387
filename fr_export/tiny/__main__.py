"""`python -m fr_export.tiny --family gemma2 [--shared] [--work DIR] [--out DIR]`: train a shipped system from nothing."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fusionroute.runtime.command_errors import one_sentence
from fusionroute.runtime.commands.options import Debug
from fusionroute.runtime.commands.verbs import Verb, run_verb
from fusionroute.runtime.terminal import Terminal

VERB = Verb("fusionroute.fr_export.tiny.__main__:main", "Train a shipped system from nothing.", extra="cpu,export,train")


def main(
    family: Annotated[Literal["gemma2", "llama3"], typer.Option(help="Model family.")],
    work: Annotated[
        Path, typer.Option(help="Folder for everything on the way; models that are complete there are not trained again.")
    ] = Path("dist/tiny"),
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: the one that the package ships.")] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="Experts and router are LoRA adapters of one base: the preset tiny-shared.")
    ] = False,
    steps_scale: Annotated[float, typer.Option(min=0.0, help="Multiplies all numbers of training steps, for a quick try.")] = 1.0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that tune λ.")] = 2,
    debug: Debug = False,
) -> None:
    """Train a family's small system from nothing and write it."""
    missing = "Training the shipped systems needs the package '{}': install the extras (pip install 'fusionroute[cpu,export,train]')."
    with one_sentence("training", missing, out or work, f"finished models stay in {work}", debug):
        from fusionroute.fr_export.families.family import TINY_SYSTEMS
        from fusionroute.fr_export.tiny.architectures import ARCHITECTURES, WIDTH
        from fusionroute.fr_export.tiny.ship import ship
        from fusionroute.fr_export.tiny.workshop import ADAPTER_RANK, BUDGETS, Workshop

        console = Terminal(stderr=True)
        kind, rank = ("-shared", ADAPTER_RANK) if shared else ("", 0)
        folder, budget = work / f"{family}-{WIDTH}{kind}", BUDGETS[family].scaled(steps_scale)
        workshop = Workshop(ARCHITECTURES[family], folder, budget=budget, lora_rank=rank)
        settings = ship(workshop, out or TINY_SYSTEMS / f"{family}{kind}", jobs, console)
        accuracy = max(value for _, value in settings.lam_curve or [])
        console.print(f"λ = {settings.lam}, mean accuracy on the validation split {accuracy:.1%}")


def app() -> None:
    """Entry point, which always exits."""
    run_verb("tiny", VERB)


if __name__ == "__main__":
    app()
