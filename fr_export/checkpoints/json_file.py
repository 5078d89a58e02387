"""JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from fusionroute.runtime.errors import InputError


def read_json(file: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError `what: …` where the file is missing or broken."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{what}: it holds no {file.name}; download or write it again.") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{what}: {file.name} cannot be read as JSON ({error}); write or download it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{what}: {file.name} holds no JSON object; write or download it again.")
    return value
