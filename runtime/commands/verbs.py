"""A command line made of a table of verbs. A verb's module is imported once the verb is called, so that all of them start quickly."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from fusionroute.runtime import __version__
from fusionroute.runtime.command_errors import MISSING, one_sentence
from fusionroute.runtime.commands.options import Debug
from fusionroute.runtime.terminal import spell_out


class Verb(NamedTuple):
    """A row of the table."""

    function: str  # "module:name"; typer makes the options of the function's parameters
    help: str  # one line for the list of verbs
    extra: str = ""  # what to install for the packages that the module needs: "export,cpu"


class VerbCommand(TyperCommand):
    """A verb in the list of verbs. Its function is imported when the command line names the verb."""

    def __init__(self, name: str, verb: Verb):
        super().__init__(name, help=verb.help)
        self._verb = verb

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        """Import the function and read its options from `args`."""
        with self._one_sentence():
            command = self._load()
        return command.make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the function; `ctx` is what `make_context` returned."""
        return ctx.command.invoke(ctx)

    def _load(self) -> Any:
        module, name = self._verb.function.split(":")
        app = typer.Typer(add_completion=False)
        app.command(self.name)(self._ending(getattr(import_module(module), name)))
        return without_flag_types(typer.main.get_command(app))

    def _ending(self, function: Callable[..., None]) -> Callable[..., None]:
        """The function, its errors ending in one sentence."""

        @wraps(function)
        def run(**options: Any) -> None:
            with self._one_sentence(options.get("debug", False)):
                function(**options)
                sys.stdout.flush()  # here, and not when the interpreter ends, a reader that has left is noticed

        return run

    def _one_sentence(self, debug: bool = False) -> Any:
        extra = self._verb.extra
        missing = f"The command {self.name} needs the package '{{}}': pip install 'fusionroute[{extra}]'." if extra else MISSING
        return one_sentence(f"command {self.name}", missing, debug=debug)


def without_flag_types(command: Any) -> Any:
    """The command, with help that shows no type behind flags, which take no value."""
    for parameter in command.get_params(typer.Context(command)):  # the one for --help is made here
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return command


def show_version(asked: bool) -> None:
    """Print the versions of the package and of the ONNX Runtime that it would run on, and exit, if `asked`."""
    if asked:
        print(", ".join([f"fusionroute {__version__}", *installed("onnxruntime", "onnxruntime-gpu")]), flush=True)
        raise typer.Exit


def installed(*packages: str) -> list[str]:
    """`NAME VERSION` of those packages that are installed. Reads their metadata and imports none."""
    versions = []
    for package in packages:
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return versions


Version = Annotated[bool, typer.Option("--version", is_eager=True, callback=show_version, help="Show the versions and exit.")]


def program(verbs: Mapping[str, Verb], help: str) -> TyperGroup:
    """The command line `PROGRAM [--debug] VERB …`; call it to run it on the process's arguments. It always exits."""
    spell_out()
    app = typer.Typer(add_completion=False, no_args_is_help=True, help=help)

    @app.callback()
    def options(
        context: typer.Context,
        version: Version = False,
        debug: Debug = False,
    ) -> None:
        context.default_map = {name: {"debug": debug} for name in verbs}  # --debug before the verb means the same as behind it

    group: TyperGroup = without_flag_types(typer.main.get_group(app))
    for name, verb in verbs.items():
        group.add_command(VerbCommand(name, verb))
    return group


def run_verb(name: str, verb: Verb, arguments: Sequence[str] | None = None, program_name: str | None = None) -> None:
    """Run one verb without naming it on the command line, as `python export.py` does. It always exits."""
    spell_out()
    VerbCommand(name, verb)(args=arguments, prog_name=program_name)
