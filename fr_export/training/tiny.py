"""`python -m fr_export.training.tiny`: the door to `python -m fr_export.tiny`."""

from fusionroute.fr_export.tiny.__main__ import app

if __name__ == "__main__":
    app()
