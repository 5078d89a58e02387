"""`fusionroute init-router`: a router with an untrained head, to try a system before training one."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fusionroute.fr_export.commands.options import BaseOption
from fusionroute.runtime.command_errors import one_sentence
from fusionroute.runtime.commands.options import Debug, Json, names
from fusionroute.runtime.terminal import Terminal


def main(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model or LoRA adapter that becomes the router: a folder or hub id.")],
    experts: Annotated[str, typer.Option(metavar="N|NAMES", help="How many experts it chooses from, or a comma list of their names.")],
    out: Annotated[Path, typer.Option(help="Folder of the router, as the exporter reads it.")],
    base: BaseOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the head, which is centred so that the choice changes from token to token.")] = 0,
    zeros: Annotated[bool, typer.Option("--zeros", help="A head of zeros: the first expert is always chosen. Needs no model run.")] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the weights; default: links to them, which take no space.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a router that was made or trained here before.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a router with an untrained routing head, to try a system before training. Its choices mean nothing."""
    missing = "Making a router needs the package '{}': install the extra 'export' (pip install 'fusionroute[export]')."
    with one_sentence("init-router", missing, out, "nothing was written", debug):
        count = int(experts) if experts.isdecimal() else len(names(experts))
        if not count:
            raise typer.BadParameter(f"'{experts}' names no expert; expected a number from 1, or names", param_hint="--experts")
        console = Terminal(stderr=True)
        with console.status("reading the model"):
            from fusionroute.fr_export.training.init_router import init_router

            router = init_router(source, count, out, seed=None if zeros else seed, base=base, copy=copy, force=force)
        if as_json:
            print(json.dumps(asdict(router)), flush=True)
            return
        head = "zeros: the first expert is always chosen" if zeros else "untrained: " + ", ".join(f"{share:.0%}" for share in router.shares)
        where = f"; {router.linked} weight files are links to {source}" if router.linked else ""
        Terminal(soft_wrap=True).print(f"{out}: a head of {count} x {router.hidden}, {head}{where}", markup=False)
