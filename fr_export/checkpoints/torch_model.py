"""A checkpoint of any source as a transformers model."""

from typing import Any

import torch

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint, empty_model, shapes_of
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.console.quiet import quiet


def torch_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    """The checkpoint as transformers runs it, in evaluation mode. Memory: the model and a slice of one tensor.

    `attention` is eager, the only kind that has Gemma-2's softcap, or sdpa. Raises InputError for values that are not
    finite.
    """
    empty = empty_model(checkpoint.config)
    state = {name: read_as(checkpoint.weights, name, dtype) for name in shapes_of(empty)}
    with quiet():
        model = type(empty).from_pretrained(None, config=checkpoint.config, state_dict=state, dtype=dtype, attn_implementation=attention)
    return model.eval()


def read_as(weights: Weights, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A whole tensor in `dtype`, converted slice by slice."""
    tensor = torch.empty(weights.shape(name), dtype=dtype)
    start = 0
    for rows in weights.rows(name):
        tensor[start : start + len(rows)] = torch.from_numpy(rows)
        start += len(rows)
    return tensor
