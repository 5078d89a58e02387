"""A checkpoint's config.json as plain JSON: enough to tell its family, without torch and transformers."""

import json
from pathlib import Path
from typing import Any

from fusionroute.fr_export.checkpoints.hub import locate
from fusionroute.fr_export.checkpoints.sources.lora_config import LoraConfig, is_adapter
from fusionroute.fr_export.families import FAMILIES, Family
from fusionroute.runtime.errors import InputError


def detect_family(source: str, base: str | None = None) -> Family:
    """The family of a checkpoint folder or hub id, as its config.json says, or of an adapter that of its base's.

    Raises InputError where there is no such folder, no config.json, or an unknown model type; UnavailableError as
    `locate` does.
    """
    folder = locate(source)
    if is_adapter(folder, str(folder), source):
        folder = LoraConfig.read(folder, str(folder)).locate_base(folder, str(folder), base)
    raw = read_json(folder / "config.json", f"{folder} is not a Hugging Face model folder")
    return family_of(str(folder), raw.get("model_type"), None)


def family_of(where: str, model_type: Any, expected: Family | None) -> Family:
    """The family of a config's model type. Raises InputError for an unknown one, or for another than the expected."""
    family = next((family for family in FAMILIES.values() if model_type in (family.model_type, *family.text_of)), None)
    if family is None or (expected is not None and expected.name != family.name):
        supported = ", ".join(f"{each.name} ('{each.model_type}')" for each in FAMILIES.values())
        mend = f"use --family {family.name}" if family else f"supported families are {supported}"
        expects = f"; family {expected.name} expects '{expected.model_type}'" if expected else ""
        raise InputError(f"{where} is of model type {model_type!r}{expects}: {mend}.")
    return expected or family


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
