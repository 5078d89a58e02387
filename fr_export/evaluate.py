"""`python -m fr_export.evaluate`: the door to `fusionroute evaluate`."""

from fusionroute.fr_export.commands.evaluate import app

if __name__ == "__main__":
    app()
