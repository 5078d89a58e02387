"""`python -m fr_export.training`: train a router."""

from fr_export.training.cli import app

if __name__ == "__main__":
    app()
