"""`python -m fr_export.training.merge`: merge experts of one base.

python -m fr_export.training.merge --method dare --base SRC --expert SRC --expert SRC --scale 0.5 --drop 0.5 --seed 0
--out DIR
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from fusionroute.fr_export.training.merge.formulas import SETTINGS, Method, formula
from fusionroute.runtime.command_errors import one_sentence
from fusionroute.runtime.commands.options import Debug
from fusionroute.runtime.commands.verbs import Verb, run_verb
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.terminal import Terminal

VERB = Verb("fusionroute.fr_export.training.merge.__main__:main", "Merge experts of one base.", extra="export")


def main(
    method: Annotated[Method, typer.Option(help="How the experts' weights are combined.")],
    base: Annotated[str, typer.Option(help="What the experts were fine-tuned from: a folder or hub id.")],
    expert: Annotated[
        list[str], typer.Option(help="An expert: a folder or hub id; repeat. The first one gives config, tokenizer and dtype.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the merged model.")],
    scale: Annotated[float | None, typer.Option(help="Of the summed differences from the base (task_arithmetic, dare); default 1.")] = None,
    drop: Annotated[float | None, typer.Option(help="Probability of dropping a difference (dare); default 0.5.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is dropped (dare); default 0.")] = None,
    debug: Debug = False,
) -> None:
    """Merge experts of one base into a single model: average, task arithmetic or DARE."""
    options = (("scale", scale), ("drop", drop), ("seed", seed))
    settings: dict[str, Any] = {name: value for name, value in options if value is not None}
    try:
        formula(method, **settings)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None
    if unused := [f"--{name}" for name in settings if name not in SETTINGS[method]]:
        raise typer.BadParameter(f"{method} does not use {unused[0]}: leave it out")
    missing = "Merging needs the package '{}': install the extra 'export' (pip install 'fusionroute[export]')."
    with one_sentence("merge", missing, out, "nothing was written", debug):
        from fusionroute.fr_export.console.progress import Stages
        from fusionroute.fr_export.training.merge.models import merge

        display = Stages(Terminal(stderr=True))
        with display.progress:
            merge(method, base, expert, out, **settings, display=display)


def app() -> None:
    """Entry point, which always exits."""
    run_verb("merge", VERB)


if __name__ == "__main__":
    app()
