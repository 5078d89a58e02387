"""SmolLM3 (https://huggingface.co/blog/smollm3): Llama's layers, of which every fourth has no rotary embedding."""

from fusionroute.fr_export.families.family import Family, Preset, check_rope

SMOLLM3 = Family(
    name="smollm3",
    model_type="smollm3",
    norm_offset=0.0,
    half="bf16",  # its checkpoints are trained and published in it
    paper=Preset(router=None, experts={}),  # the paper has no SmolLM3 system
    precisions={"ort:cpu": ("fp32", "int8"), "other": ("bf16", "int8")},
    check=check_rope,
)
