"""Parsers of what strangers write, given inputs without end: see `python -m tests.attacks.fuzz --help`."""
