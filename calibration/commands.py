"""`python -m calibration FILE`: what a calibration table says."""

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fusionroute.runtime.errors import FusionError, one_line


def main(
    file: Annotated[Path, typer.Argument(help="Calibration table that an export wrote (.safetensors).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Show what the activations of a system look like where each expert works: ranges, outliers, and who answered."""
    try:
        from fusionroute.calibration.show import show
        from fusionroute.calibration.table import Table

        summary = Table.load(file).summary()
    except (FusionError, ModuleNotFoundError) as error:
        if debug:
            traceback.print_exc()
        lacking = f"The calibration needs the package '{getattr(error, 'name', '')}': install the extra 'export'."
        print(f"error: {one_line(error) if isinstance(error, FusionError) else lacking}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(summary), flush=True)
    else:
        show(Console(highlight=False), summary)


def app() -> None:
    """Entry point."""
    typer.run(main)


if __name__ == "__main__":
    app()
