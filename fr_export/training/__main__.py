"""`python -m fr_export.training`: train a router."""

from fusionroute.fr_export.commands.train import app

if __name__ == "__main__":
    app()
