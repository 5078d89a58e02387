"""Gemma 3 (arXiv:2503.19786), text: local layers with a sliding window and global ones, each kind with rotary
frequencies of its own; norms on queries and keys, RMSNorm by 1 + w, scaled embedding.
"""

from typing import Any

from fusionroute.fr_export.families.family import Family, check_rope, check_windows
from fusionroute.runtime.errors import InputError


def check(where: str, config: Any) -> None:
    """Sliding windows need a length, and attention must look back only (embedding models look both ways)."""
    check_rope(where, config)
    check_windows(where, config)
    if getattr(config, "use_bidirectional_attention", None):
        raise InputError(f"{where} attends in both directions, so it cannot generate: use a causal Gemma-3 checkpoint.")


GEMMA3 = Family(
    name="gemma3",
    model_type="gemma3_text",
    norm_offset=1.0,
    half="bf16",  # its residual stream leaves fp16's range, as Gemma 2's does
    precisions={"ort:cpu": ("fp32", "int8"), "other": ("bf16", "int8")},
    check=check,
    wide_residual=True,
    text_of=("gemma3",),  # those that read images too
)
