"""What a dialect consists of: a module with these names is one."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from fusionroute.fr_export.checkpoints.system import RoutingHead
from fusionroute.fr_export.graphs.graph import Graph


class Dialect(Protocol):
    """One dialect of ONNX."""

    def __hash__(self) -> int:
        """Traces are kept by dialect."""
        ...

    @property
    def OPSET(self) -> int:
        """The version of ONNX's own operators."""
        ...

    def Forward(self, model: Any, max_seq_len: int) -> nn.Module:
        """The module whose call is traced: (logits, hidden, present) from the arguments of `example`."""
        ...

    def example(self, config: Any, max_seq_len: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Example arguments of it and which of their dimensions vary."""
        ...

    def names(self, layers: int) -> tuple[list[str], list[str]]:
        """Names of the graph's inputs and outputs, in order."""
        ...

    def emitting(self, model: Any) -> AbstractContextManager[None]:
        """Within it the model's linear, norm and attention calls emit this dialect's operators."""
        ...

    def finish(self, graph: Graph, max_seq_len: int) -> None:
        """The graph passes that pay in this dialect, and dimensions with names that people can read."""
        ...

    def end_with(self, graph: Graph, head: RoutingHead | None) -> None:
        """Turn the hidden output into the router's `routing` [1, K, n] (always fp32), or drop it for an expert."""
        ...
