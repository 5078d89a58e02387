"""What `python -m runtime bench` measures, and how it is shown."""
