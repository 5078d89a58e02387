"""Phi-3 and Phi-4 (arXiv:2404.14219, arXiv:2503.01743): Llama's layers with packed projections; a part of each head may
be turned, a window may slide over all layers, and longrope may stretch the rotary frequencies.
"""

from fusionroute.fr_export.families.family import Family, check_attention

PHI3 = Family(
    name="phi3",
    model_type="phi3",
    norm_offset=0.0,
    half="bf16",  # its checkpoints are trained and published in it
    precisions={"ort:cpu": ("fp32", "int8"), "other": ("bf16", "int8")},
    check=check_attention,
)
