"""The language model inside a checkpoint that also reads images: its tensors under the names that they have alone."""

from collections.abc import Mapping

from fusionroute.fr_export.checkpoints.tensors import StoredTensor

# how transformers names the language model in such checkpoints: its older and its newer layout
INSIDE = {"language_model.": "", "model.language_model.": "model."}
OTHER = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def text_name(name: str) -> str:
    """The name that a tensor or module of the language model has alone."""
    prefix = next((prefix for prefix in INSIDE if name.startswith(prefix)), "")
    return INSIDE.get(prefix, "") + name.removeprefix(prefix)


def text_part(entries: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The tensors by the names of the language model alone, and what to say of those that are left out."""
    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        if not name.startswith(OTHER):
            tensors[text_name(name)] = entry
    left_out = len(entries) - len(tensors)
    return tensors, (f"its language model alone: {left_out} tensors that read images are left out",) if left_out else ()
