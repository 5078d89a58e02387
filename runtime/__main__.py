"""`python -m runtime VERB …`: the verbs of `fusionroute` that need the runtime alone."""

from fusionroute.runtime.commands import VERBS
from fusionroute.runtime.commands.verbs import program


def main() -> None:
    """Run the verb that the command line names. It always exits."""
    program(VERBS, "Run FusionRoute bundles.")()


if __name__ == "__main__":
    main()
