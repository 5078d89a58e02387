"""Mistral (arXiv:2310.06825): Llama's layers, with one sliding window for all of them where the config names one."""

from typing import Any

from fusionroute.fr_export.families.family import Family, check_rope, check_windows
from fusionroute.runtime.errors import InputError


def check(where: str, config: Any) -> None:
    """All layers attend alike: transformers does not read the layers' types of Mistral's descendants."""
    check_rope(where, config)
    check_windows(where, config)
    if getattr(config, "layer_types", None):
        raise InputError(f"{where} has 'layer_types' in its config.json, which Mistral's layers do not read: remove them there.")


MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    norm_offset=0.0,
    half="fp16",  # its largest activations stay in the hundreds (arXiv:2402.17762)
    precisions={"ort:cpu": ("fp32", "int8"), "other": ("fp16", "int8")},
    check=check,
)
