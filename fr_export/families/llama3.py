"""Llama 3 (arXiv:2407.21783): grouped-query attention, rotary scaling "llama3", tied (3.2) or untied (3, 3.1) heads."""

from fusionroute.fr_export.families.family import Family, Preset, check_rope

LLAMA3 = Family(
    name="llama3",
    model_type="llama",
    norm_offset=0.0,
    half="fp16",
    paper=Preset(
        router=None,
        experts={
            "math": "MergeBench/Llama-3.1-8B-Instruct_math",
            "code": "MergeBench/Llama-3.1-8B-Instruct_coding",
            "instruction": "meta-llama/Llama-3.1-8B-Instruct",
        },
    ),
    precisions={"ort:cpu": ("fp32", "int8"), "other": ("fp16", "int8")},
    check=check_rope,
)
