"""Qwen 3, dense (arXiv:2505.09388): a norm on each head of queries and keys, in front of the rotary embedding; windows
as in Qwen 2.
"""

from fusionroute.fr_export.families.family import Family, check_attention

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    norm_offset=0.0,
    half="bf16",  # as trained: the first token's activations are thousands of times the others', fp16's range is untried
    precisions={"ort:cpu": ("fp32", "int8"), "other": ("bf16", "int8")},
    check=check_attention,
)
