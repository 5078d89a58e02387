"""`fusionroute VERB …`: the table of all verbs.

A new verb is one new file and one line here. A verb that needs the runtime alone stands in the runtime's table,
`runtime/commands`.
"""

from collections.abc import Sequence

from fusionroute.calibration import commands as calibration
from fusionroute.runtime import commands as runtime
from fusionroute.runtime.commands.verbs import Verb, program, run_verb

VERBS = {
    "export": Verb("fusionroute.fr_export.commands.export:main", "Export a router and its experts into a bundle.", extra="export,cpu"),
    **runtime.VERBS,
    "push": Verb("fusionroute.fr_export.commands.hub:push", "Push a bundle to the Hugging Face hub.", extra="hub"),
    "pull": Verb("fusionroute.fr_export.commands.hub:pull", "Pull a bundle from the Hugging Face hub.", extra="cpu,hub"),
    "init-router": Verb("fusionroute.fr_export.commands.init_router:main", "Make a router with an untrained head.", extra="export"),
    "train": Verb("fusionroute.fr_export.commands.train:main", "Train a router for given experts.", extra="export,train"),
    "evaluate": Verb("fusionroute.fr_export.commands.evaluate:main", "Measure the accuracy of bundles on tasks.", extra="train"),
    "calibrate": calibration.VERB,
}


def main() -> None:
    """Run the verb that the command line names. It always exits."""
    program(VERBS, "Export, run, measure and train FusionRoute systems: a router LM and expert LMs, one chosen per token.")(
        prog_name="fusionroute"
    )


def run(name: str, arguments: Sequence[str] | None = None, program_name: str | None = None) -> None:
    """Run one verb alone, on the process's arguments where none are given. It always exits.

    For the commands that are called by other names, such as `python export.py`; help calls it `program_name`.
    """
    run_verb(name, VERBS[name], arguments, program_name)
