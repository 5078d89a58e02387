"""`python -m calibration`: the door to the command."""

from fusionroute.calibration.commands import app

if __name__ == "__main__":
    app()
