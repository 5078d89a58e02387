"""What users must add to other runtimes to fuse models: the routing head, and what each expert has missed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from safetensors.numpy import load_file

Row = TypeVar("Row")  # what a reader returns for the last token: logits, or nothing


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


class Experts(Generic[Row]):
    """How many tokens each expert has read. `readers`, one per expert, run the expert on ids int32 [S]."""

    def __init__(self, readers: list[Callable[[np.ndarray], Row]]):
        self.readers, self.lengths = readers, [0] * len(readers)

    def catch_up(self, expert: int, tokens: list[int]) -> Row:
        """Let an expert read the tokens it has missed, as one chunk; returns what its reader returns."""
        missed = np.array(tokens[self.lengths[expert] :], np.int32)
        self.lengths[expert] = len(tokens)
        return self.readers[expert](missed)
