"""Keeps libraries off the user's terminal."""

import contextlib
import io
import logging
import warnings
from typing import Any

from transformers.utils import logging as progress


@contextlib.contextmanager
def quiet() -> Any:
    """Silence progress prints of torch and transformers, and warnings about their own internals."""
    level, bars = logging.root.manager.disable, progress.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    progress.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if bars:
            progress.enable_progress_bar()
