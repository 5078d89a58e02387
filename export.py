"""The door: `python export.py --family gemma2` exports a FusionRoute system into a bundle."""

from fusionroute.fr_export.commands.export import app

if __name__ == "__main__":
    app()
