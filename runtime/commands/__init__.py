"""The verbs of `python -m runtime`, one file each."""
