"""The door: `python export.py --family gemma2` exports a FusionRoute system into a bundle."""

from fr_export.cli import app

if __name__ == "__main__":
    app()
