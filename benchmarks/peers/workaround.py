"""What users write around other runtimes to fuse models: the routing head, and which tokens an expert has missed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


@dataclass
class Routing:
    """The routing head: weight float32 [n_experts, hidden], bias float32 [n_experts]."""

    weight: np.ndarray
    bias: np.ndarray

    @classmethod
    def load(cls, router: Path) -> "Routing":
        """From a router's checkpoint."""
        tensors = load_file(router / "routing_head.safetensors")
        weight = tensors["routing_head.weight"].astype(np.float32)
        return cls(weight, tensors.get("routing_head.bias", np.zeros(len(weight))).astype(np.float32))

    def choose(self, hidden: np.ndarray) -> int:
        """The expert for a hidden state float32 [hidden]."""
        return int((self.weight @ np.asarray(hidden, np.float32) + self.bias).argmax())


class Experts:
    """How far each expert has read. `readers` append ids int32 [S] to one expert each, and run it on them."""

    def __init__(self, readers: list[Callable[[np.ndarray], object]]):
        self.readers, self.lengths = readers, [0] * len(readers)

    def catch_up(self, expert: int, tokens: list[int]) -> object:
        """Let one expert read all that it missed as one chunk; what its reader returns."""
        missed = np.array(tokens[self.lengths[expert] :], np.int32)
        self.lengths[expert] = len(tokens)
        return self.readers[expert](missed)
