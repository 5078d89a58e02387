"""A checkpoint's config.json as plain JSON: enough to tell its family, without torch and transformers."""

from typing import Any

from fusionroute.fr_export.checkpoints.hub import locate
from fusionroute.fr_export.checkpoints.json_file import read_json
from fusionroute.fr_export.checkpoints.sources import gguf_file
from fusionroute.fr_export.checkpoints.sources.adapter_base import locate_base
from fusionroute.fr_export.families import FAMILIES, Family
from fusionroute.runtime.adapters.lora_config import LoraConfig, is_adapter
from fusionroute.runtime.errors import InputError

GGUF_MODEL_TYPES = {"gemma3": "gemma3_text"}  # where transformers and llama.cpp differ


def detect_family(source: str, base: str | None = None) -> Family:
    """The family of a checkpoint folder or hub id, as its config.json says, or of an adapter that of its base's.

    A GGUF file without a config.json beside it names its architecture.

    Raises InputError where there is no such folder, no config.json, or an unknown model type; UnavailableError as
    `locate` does.
    """
    folder = locate(source)
    if is_adapter(folder, str(folder), source):
        folder = locate_base(LoraConfig.read(folder, str(folder)), folder, str(folder), base)
    config = (folder.parent if folder.is_file() else folder) / "config.json"
    if not config.is_file() and (file := gguf_file.find(folder)) is not None:
        architecture = gguf_file.read(file).architecture
        return family_of(str(file), GGUF_MODEL_TYPES.get(architecture, architecture), None)
    raw = read_json(config, f"{folder} is not a Hugging Face model folder")
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
