"""SmolLM3 (https://huggingface.co/blog/smollm3): Llama's layers, of which every fourth has no rotary embedding."""

from typing import Any

from fusionroute.fr_export.families.family import Family, check_rope, check_windows


def check(where: str, config: Any) -> None:
    """Layers without rotary embedding may slide."""
    check_rope(where, config)
    check_windows(where, config)


SMOLLM3 = Family(
    name="smollm3",
    model_type="smollm3",
    norm_offset=0.0,
    half="bf16",  # its checkpoints are trained and published in it
    precisions={"ort:cpu": ("fp32", "int8"), "other": ("bf16", "int8")},
    check=check,
)
