"""Qwen 2 and 2.5 (arXiv:2407.10671, 2412.15115): biases on queries, keys and values; where `use_sliding_window` is set,
the layers from `max_window_layers` on look back through a window.
"""

from fusionroute.fr_export.families.family import Family, check_attention

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    norm_offset=0.0,
    half="bf16",  # 2.5 has channels beyond fp16's 65,504: https://github.com/turboderp-org/exllamav2/issues/627
    precisions={"ort:cpu": ("fp32", "int8"), "other": ("bf16", "int8")},
    check=check_attention,
    wide_residual=True,
    # by its biases; Qwen2-7B's perplexity in bf16 is 8.0 without: https://github.com/huggingface/transformers/pull/33317
    wide_scores=True,
)
