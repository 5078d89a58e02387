"""What a block's graph takes beside states and weights, for a whole text."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def context_feeds(inputs: Sequence[Any], text: np.ndarray) -> dict[str, np.ndarray]:
    """Of the `inputs` of a block's session, those besides states and weights, for a whole text int64 [S] and an empty cache."""
    length = len(text)
    available = {
        "input_ids": text[None],
        "seqlens_k": np.array([length - 1], np.int32),
        "total_sequence_length": np.array(length, np.int32),
        "logit_positions": np.arange(length),
    }
    feeds: dict[str, np.ndarray] = {}
    for graph_input in inputs:
        if graph_input.name in available:
            feeds[graph_input.name] = available[graph_input.name]
        elif graph_input.name in ("past.key", "past.value"):
            _, heads, _, size = graph_input.shape
            feeds[graph_input.name] = np.zeros((1, heads, length, size), np.float32)
    return feeds
