"""End a graph of `dialects.pair`: what sets an expert apart comes in through inputs, and each model gets its own answer.

The sibling of `pair_segments` for engines. Factors multiply the tokens of both models, and what the router's gave is
dropped before the second factor: on a GPU, rows more in a product cost nothing beside reading the factor, and there is
one operator less than where rows are cut out and put back. Ranks are fixed, since TensorRT chooses its kernels by them.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.factors import Factors
from fusionroute.fr_export.graphs.graph import Graph, Source, added, initializer, node
from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.limits import DELTA, EXPERT

NORMS = ("RMSNormalization", "SimplifiedLayerNormalization")
RANKS = 8  # ranks are multiples of it: tensor cores read 16 bytes of each row at once
END = np.iinfo(np.int64).max
INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL


def expert_factors(graph: Graph, ranks: Mapping[str, int], vectors: Collection[str]) -> list[Factors]:
    """Rewrite a pair's graph with its routing head, before it has weights.

    `ranks`: matrices that experts change → the largest rank of any expert. The graph gains inputs as `pair_segments`
    makes them, in the type of what they meet; `logits` and `routing` become the router's, and `expert.logits` the
    expert's. Raises FusionError for a weight that no product or norm reads.
    """
    return _Ending(graph).run(ranks, vectors)


class _Ending:
    """One rewrite."""

    def __init__(self, graph: Graph):
        self.graph, self.inner = graph, graph.model.graph
        self.first = next(iter(self.inner))  # what depends on the lengths alone is computed before it
        self.masks: dict[int, ir.Value] = {}
        inputs = {str(value.name): value for value in self.inner.inputs}
        self.count = self.length(inputs["input_ids"], 1)
        self.answered = self.length(inputs["logit_positions"], 0)
        total = self.before("Add", [self.count, self.length(inputs[f"{EXPERT}input_ids"], 1)], "pair.total", [1], INT64)
        stop = self.before("Squeeze", [total, self.constant("pair.axis", [0])], "pair.stop", [], INT64)
        every = self.before("Range", [self.constant("pair.start", 0), stop, self.constant("pair.step", 1)], "pair.rows", None, INT64)
        self.rows = self.before("GreaterOrEqual", [every, self.count], "pair.expert_rows", None, BOOL)

    def run(self, ranks: Mapping[str, int], vectors: Collection[str]) -> list[Factors]:
        """See `expert_factors`."""
        products = [n for n in self.inner if n.op_type == "FusedMatMul" and n.inputs[1].name in ranks]
        scalings = [n for n in self.inner if n.op_type in (*NORMS, "Mul") and n.inputs[1].name in vectors]
        if unread := sorted({*ranks, *vectors} - {str(n.inputs[1].name) for n in (*products, *scalings)}):
            raise FusionError(f"The weight '{unread[0]}' has uses that cannot differ between router and expert: leave --shared-base out.")
        for scaling in scalings:
            self.scale(scaling)
        readers: dict[ir.Value, list[ir.Node]] = {}
        for product in products:
            readers.setdefault(product.inputs[0], []).append(product)
        factors = [self.add_delta(x, products, ranks) for x, products in readers.items()]
        self.answer()
        return factors

    def scale(self, n: ir.Node) -> None:
        """Let a norm, or its last operator, scale the router's tokens by its weight and the expert's by an input."""
        result, weight = n.outputs[0], n.inputs[1]
        own = self.input(f"{DELTA}{weight.name}", weight.shape or (), weight)
        chosen = added(
            self.inner,
            n,
            "Where",
            [self.mask(len(result.shape)), own, weight],
            f"{weight.name}.chosen",
            dtype=weight.dtype or ir.DataType.FLOAT,
        )
        if n.op_type == "Mul":
            n.replace_input_with(1, chosen)
            return
        n.replace_input_with(1, self.ones(weight))
        scaled = ir.Value(name=f"{result.name}.scaled", type=result.type, shape=result.shape)
        result.replace_all_uses_with(scaled)
        self.inner.insert_after(n, ir.Node("", "Mul", [result, chosen], outputs=[scaled]))

    def add_delta(self, x: ir.Value, products: Sequence[ir.Node], ranks: Mapping[str, int]) -> Factors:
        """Add x·a·b to the expert's tokens of every product that reads x."""
        names = [str(product.inputs[1].name) for product in products]
        rank = -(-max(1, *(ranks[name] for name in names)) // RANKS) * RANKS
        a = self.input(f"{DELTA}{names[0]}.a", [int(x.shape[-1]), len(names) * rank], x)
        dtype, first = x.dtype or ir.DataType.FLOAT, products[0]
        narrow = added(self.inner, first, "MatMul", [x, a], f"{a.name}.product", dtype=dtype)
        own = added(self.inner, first, "Where", [self.mask(len(x.shape)), narrow, self.zero(dtype)], f"{a.name}.expert", dtype=dtype)
        low = [own]
        if len(names) > 1:
            low = [ir.Value(name=f"{DELTA}{name}.low", type=x.type) for name in names]
            node(self.inner, first, "Split", [own, self.constant(f"{a.name}.ranks", [rank] * len(names))], list(low), axis=-1)
        inputs = {}
        for name, product, part in zip(names, products, low, strict=True):
            result = product.outputs[0]
            b = self.input(f"{DELTA}{name}.b", [rank, int(result.shape[-1])], x)
            delta, total = (ir.Value(name=f"{result.name}.{what}", type=result.type, shape=result.shape) for what in ("delta", "total"))
            result.replace_all_uses_with(total)
            nodes = [ir.Node("", "MatMul", [part, b], outputs=[delta]), ir.Node("", "Add", [result, delta], outputs=[total])]
            self.inner.insert_after(product, nodes)
            inputs[name] = str(b.name)
        return Factors(str(a.name), inputs)

    def answer(self) -> None:
        """Give each model its own rows of the logits, and the router alone those of the routing head."""
        start, end, axis = self.constant("pair.begin", [0]), self.constant("pair.end", [END]), self.constant("pair.positions", [1])
        for place, value in enumerate(list(self.inner.outputs)):
            if value.name not in ("logits", "routing"):
                continue
            name, value.name = str(value.name), f"{value.name}.both"
            parts = {name: (start, self.answered), f"{EXPERT}{name}": (self.answered, end)}
            for part, (begin, stop) in parts.items():
                positions = "expert_positions" if part.startswith(EXPERT) else "positions"
                rows = ir.Value(name=part, type=value.type, shape=ir.Shape([1, positions, value.shape[-1]]))
                if part == name:
                    self.inner.outputs[place] = rows
                elif name == "logits":
                    self.inner.outputs.append(rows)
                else:
                    continue
                node(self.inner, None, "Slice", [value, begin, stop, axis], [rows])

    def mask(self, rank: int) -> ir.Value:
        """Which tokens are the expert's, bool [1, tokens, 1, …] of so many dimensions."""
        if rank not in self.masks:
            axes = self.constant(f"pair.axes.{rank}", [0, *range(2, rank)])
            self.masks[rank] = self.before("Unsqueeze", [self.rows, axes], f"pair.mask.{rank}", None, BOOL)
        return self.masks[rank]

    def ones(self, weight: ir.Value) -> ir.Value:
        """The weight of a norm that does not scale, like another one."""
        width, dtype = int(weight.shape[0]), weight.dtype or ir.DataType.FLOAT
        name = f"ones.{width}.{dtype.name.lower()}"
        self.graph.sources[name] = Source(constant=np.ones(width, np.float32))
        return self.inner.initializers.get(name) or initializer(self.inner, name, dtype, (width,))

    def zero(self, dtype: ir.DataType) -> ir.Value:
        """A scalar."""
        name = f"pair.zero.{dtype.name.lower()}"
        return self.inner.initializers.get(name) or initializer(
            self.inner, name, dtype, (), ir.tensor(np.zeros((), dtype.numpy()), dtype=dtype, name=name)
        )

    def length(self, value: ir.Value, axis: int) -> ir.Value:
        """One dimension of an input, int64 [1]."""
        return self.before("Shape", [value], f"{value.name}.count", [1], INT64, start=axis, end=axis + 1)

    def before(
        self, op: str, inputs: Sequence[ir.Value], name: str, shape: list[int] | None, dtype: ir.DataType, **attributes: int
    ) -> ir.Value:
        """The result of a new node in front of all others of the graph as it was."""
        return added(self.inner, self.first, op, list(inputs), name, None if shape is None else ir.Shape(shape), dtype, **attributes)

    def constant(self, name: str, values: int | list[int]) -> ir.Value:
        """A small int64 constant."""
        array = np.array(values, np.int64)
        return self.inner.initializers.get(name) or initializer(self.inner, name, INT64, array.shape, ir.tensor(array, name=name))

    def input(self, name: str, shape: Iterable[int | ir.SymbolicDim], like: ir.Value) -> ir.Value:
        """A new input of the graph, of the type of another value."""
        value = ir.Value(name=name, type=ir.TensorType(like.dtype or ir.DataType.FLOAT), shape=ir.Shape(shape))
        self.inner.inputs.append(value)
        return value
