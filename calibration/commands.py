"""`fusionroute calibrate FILE`, `python -m calibration FILE`: what a calibration table says."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fusionroute.runtime.command_errors import one_sentence
from fusionroute.runtime.commands.options import Debug, Json
from fusionroute.runtime.commands.verbs import Verb
from fusionroute.runtime.terminal import Terminal

VERB = Verb("fusionroute.calibration.commands:main", "Show what a calibration recorded.", extra="export")


def main(
    file: Annotated[Path, typer.Argument(help="Calibration table that an export wrote (.safetensors).")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what the activations of a system look like where each expert works: ranges, outliers, and who answered."""
    missing = "The calibration needs the package '{}': install the extra 'export' (pip install 'fusionroute[export]')."
    with one_sentence("calibration", missing, file, "", debug):
        from fusionroute.calibration.show import show
        from fusionroute.calibration.table import Table

        summary = Table.load(file).summary()
        if as_json:
            print(json.dumps(summary), flush=True)
        else:
            show(Terminal(), summary)
