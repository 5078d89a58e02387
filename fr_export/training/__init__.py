"""Training of routers, and of the small systems that the repository ships (`python -m fr_export.training.tiny`)."""
