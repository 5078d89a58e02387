"""`python -m fr_export.evaluate`: the same as `fusionroute evaluate`."""

from fusionroute.fr_export.commands.main import run

if __name__ == "__main__":
    run("evaluate")
