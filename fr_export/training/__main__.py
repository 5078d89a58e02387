"""`python -m fr_export.training`: the same as `fusionroute train`."""

from fusionroute.fr_export.commands.main import run

if __name__ == "__main__":
    run("train")
