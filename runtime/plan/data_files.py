"""The data files beside the code: shapes of models, devices, and what others measured, each number with its source."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


@cache
def read(name: str) -> Any:
    """One of the data files, by its name without an ending."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
