"""Gemma 2 (arXiv:2408.00118): softcapped attention and logits, alternating sliding windows, RMSNorm by 1 + w, scaled
embedding.
"""

from typing import Any

from fusionroute.fr_export.families.family import Family, Preset, check_rope, check_windows
from fusionroute.runtime.errors import InputError


def check(where: str, config: Any) -> None:
    """Sliding windows need a length, and attention must look back only (Gemma's encoder variants do not)."""
    check_rope(where, config)
    check_windows(where, config)
    if getattr(config, "use_bidirectional_attention", None):
        raise InputError(f"{where} attends in both directions, so it cannot generate: use a causal Gemma-2 checkpoint.")


GEMMA2 = Family(
    name="gemma2",
    model_type="gemma2",
    norm_offset=1.0,
    half="bf16",  # what its norms do not bound grows beyond fp16's 65,504
    paper=Preset(
        router=None,
        experts={
            "math": "MergeBench/gemma-2-2b-it_math",
            "code": "MergeBench/gemma-2-2b-it_coding",
            "instruction": "MergeBench/gemma-2-2b-it_instruction",
        },
    ),
    precisions={"ort:cpu": ("fp32", "int8"), "other": ("bf16", "int8")},
    check=check,
    wide_residual=True,
)
