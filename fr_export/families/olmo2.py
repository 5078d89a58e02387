"""OLMo 2 (arXiv:2501.00656): norms behind attention and MLP, none in front of them, and a norm over all queries and over
all keys.
"""

from fusionroute.fr_export.families.family import Family, check_rope

OLMO2 = Family(
    name="olmo2",
    model_type="olmo2",
    norm_offset=0.0,
    half="bf16",  # as trained: attention and MLP read the residual stream, which no norm bounds
    precisions={"ort:cpu": ("fp32", "int8"), "other": ("bf16", "int8")},
    check=check_rope,
)
