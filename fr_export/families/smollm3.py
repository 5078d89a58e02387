"""SmolLM3 (https://huggingface.co/blog/smollm3): Llama's layers, of which every fourth has no rotary embedding."""

from fusionroute.fr_export.families.family import Family, check_attention

SMOLLM3 = Family(
    name="smollm3",
    model_type="smollm3",
    norm_offset=0.0,
    half="bf16",  # its checkpoints are trained and published in it
    precisions={"ort:cpu": ("fp32", "int8"), "other": ("bf16", "int8")},
    check=check_attention,
)
