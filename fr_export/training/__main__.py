"""`python -m fr_export.training`: the door to `fusionroute train`."""

from fusionroute.fr_export.commands.train import app

if __name__ == "__main__":
    app()
