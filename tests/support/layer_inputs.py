"""Inputs of the linear layers of a plain torch model."""

import re
from typing import Any

import numpy as np
import torch
from torch import nn


@torch.no_grad()
def linear_inputs(model: Any, text: np.ndarray) -> dict[str, np.ndarray]:
    """Input [S, K] of every linear layer of a torch model, by the layer's name."""
    inputs: dict[str, np.ndarray] = {}

    def store_input(name: str) -> Any:
        return lambda _, arguments: inputs.__setitem__(name, arguments[0][0].numpy())

    hooks = [module.register_forward_pre_hook(store_input(name)) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    model(input_ids=torch.from_numpy(text)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs


def layers_of(matrix: str, packed: bool = False) -> list[str]:
    """The linear layers of the torch model whose weights are in a matrix of the graph; `packed`: query, key and value
    are one layer in the model too.
    """
    if "layers." not in matrix:
        return ["lm_head"]
    name = re.sub(r"^.*?(model\.layers\.)", r"\1", matrix).removesuffix(".weight").replace("model.model.", "model.")
    return [name.replace("qkv", kind) for kind in "qkv"] if "qkv" in name and not packed else [name]
