"""`python -m runtime`: generate, bench, inspect, build, cache."""

import sys
import traceback
from typing import Annotated

import typer

from fusionroute.runtime.commands.bench import bench
from fusionroute.runtime.commands.build import build
from fusionroute.runtime.commands.cache import cache
from fusionroute.runtime.commands.generate import generate
from fusionroute.runtime.commands.inspect import inspect
from fusionroute.runtime.errors import FusionError, one_line

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Run FusionRoute bundles.")
app.command()(generate)
app.command()(bench)
app.command()(inspect)
app.command()(build)
app.command()(cache)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """Run FusionRoute bundles."""


def main() -> None:
    """Run a command; errors end in one sentence on stderr and exit status 1."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        meant = isinstance(error, FusionError)  # else a fault of the runtime or of a library, not of the input
        where = "" if meant else f"unexpected {type(error).__name__}, see it with --debug before the command: "
        print(f"error: {where}{one_line(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
