"""`optimum-cli export fusionroute …`, with the options of export.py.

The wheel installs this file as optimum/commands/register/register_fusionroute.py, where Optimum looks for commands of
other packages (https://huggingface.co/docs/optimum/main/en/exporters/overview). Nothing here imports this file, so that
Optimum need not be installed.
"""

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class FusionRouteExportCommand(BaseOptimumCLICommand):
    """Hands all arguments to the exporter's own command line."""

    COMMAND = CommandInfo(name="fusionroute", help="Export a FusionRoute system: a router and the experts that it chooses from.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Accept any arguments, unread."""
        parser.prefix_chars = "\0"  # no argument is an option here, not even --help
        parser.add_argument("arguments", nargs="*")

    def run(self) -> None:
        """Run the exporter, which ends the process with its exit status."""
        from fusionroute.fr_export.commands.main import run

        run("export", self.args.arguments, "optimum-cli export fusionroute")


REGISTER_COMMANDS = [(FusionRouteExportCommand, ExportCommand)]
