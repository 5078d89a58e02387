"""The names that PEFT gives to the tensors of a LoRA adapter, and the modules of the language model that they belong to."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from fusionroute.runtime.errors import InputError

PREFIX = "base_model.model."
# behind a module's name: parts of an adapter of it
PART = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
    r"(?:\.weight)?"
)
WRAPPERS = re.compile(r"\.(base_layer|modules_to_save|original_module)\.")  # PEFT's modules around the base's own
# how transformers names the language model in checkpoints that also read images: its older and its newer layout
INSIDE = {"language_model.": "", "model.language_model.": "model."}
OTHER = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


class AdapterNames(NamedTuple):
    """modules: module, by its name in the file, as the config has it → part of its adapter → tensor. whole: name of a
    tensor in the language model alone → tensor that stands in its place. Tensors are named as in the file.
    """

    modules: dict[str, dict[str, str]]
    whole: dict[str, str]


def text_name(name: str) -> str:
    """The name that a tensor or module of the language model has alone."""
    prefix = next((prefix for prefix in INSIDE if name.startswith(prefix)), "")
    return INSIDE.get(prefix, "") + name.removeprefix(prefix)


def sort_names(tensors: Iterable[str], where: str) -> AdapterNames:
    """What the tensors of an adapter's file are; those that read images are left out.

    Raises InputError for a part that is not known, and where there is nothing.
    """
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    whole: dict[str, str] = {}
    for tensor in tensors:
        name = tensor.removeprefix(PREFIX)
        if name.startswith(OTHER):  # as the report says of the base
            continue
        if part := PART.fullmatch(name):
            modules[part[1]][part[2]] = tensor
        elif "lora_" in name:
            raise InputError(f"{where} has the tensor '{tensor}', which this version does not know: merge it with PEFT first.")
        else:
            whole[text_name(WRAPPERS.sub(".", name))] = tensor
    if not modules and not whole:
        raise InputError(f"{where} holds no tensors in its adapter_model.safetensors; save or download the adapter again.")
    return AdapterNames(dict(modules), whole)
