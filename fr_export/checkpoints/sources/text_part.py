"""The language model inside a checkpoint that also reads images: its tensors under the names that they have alone."""

from collections.abc import Mapping

from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.runtime.adapters.peft_names import OTHER, text_name


def text_part(entries: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The tensors by the names of the language model alone, and what to say of those that are left out."""
    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        if not name.startswith(OTHER):
            tensors[text_name(name)] = entry
    left_out = len(entries) - len(tensors)
    return tensors, (f"its language model alone: {left_out} tensors that read images are left out",) if left_out else ()
