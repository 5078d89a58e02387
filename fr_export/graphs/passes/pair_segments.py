"""One pass for router and expert: a graph that reads two segments of one sequence, the router's tokens before the
expert's, so that every product reads its weights once for both.

Attention runs once per segment, with a KV cache for each. What sets an expert apart from the weights in the graph comes
in through inputs, so that another expert is another binding: low-rank factors of its matrices, and whole vectors.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import Graph, Source, added, initializer, node
from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.limits import DELTA, EXPERT

NORMS = {"SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 2}  # operator → which input is its weight
STATES, CACHES, LENGTHS, TABLES = slice(0, 3), slice(3, 5), slice(5, 7), slice(7, None)  # inputs of GroupQueryAttention
FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


@dataclass(frozen=True)
class Factors:
    """The inputs with what an expert adds to the matrices that read one value x, by their names.

    a: float32 [K, m·r] for m matrices, of which each takes r columns, in their order. b: matrix [N, K] → its input
    float32 [r, N]. The matrix's product gains x·a·b.
    """

    a: str
    b: dict[str, str]


def pair_segments(graph: Graph, matrices: Collection[str], vectors: Collection[str]) -> list[Factors]:
    """Rewrite a graph of the `ort` dialect, as `finish` leaves it and before it has weights.

    `matrices` and `vectors` are the initialisers that experts change. The graph gains the inputs `segments` int64 [2],
    how many tokens of `input_ids` are the router's and the expert's (neither may be 0); the inputs and outputs of
    attention once more, named `expert.…`; those of the factors, which it returns; and for each vector `delta.{name}`,
    its values for the expert.

    Raises FusionError for a weight that no product or norm reads.
    """
    return _Pairing(graph).run(matrices, vectors)


class _Pairing:
    """One rewrite. `parts` holds the segments of each value that was split, or that is made of segments."""

    def __init__(self, graph: Graph):
        self.graph, self.inner = graph, graph.model.graph
        self.parts: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self.masks: dict[int, ir.Value] = {}
        self.first = next(iter(self.inner))  # what depends on the segments' lengths alone is computed before it
        self.segments = self.input("segments", [2], INT64)
        self.lengths = [ir.Value(name=f"segments.{who}", type=ir.TensorType(INT64), shape=ir.Shape([1])) for who in ("router", "expert")]
        node(self.inner, self.first, "Split", [self.segments], list(self.lengths), num_outputs=2, axis=0)
        begins, ends = self.constant("segments.begin", [0]), self.constant("segments.end", [0, 0, 0, 0])
        self.padding = self.before("Concat", [begins, self.lengths[0], ends], "segments.padding", [6], INT64, axis=0)

    def run(self, matrices: Collection[str], vectors: Collection[str]) -> list[Factors]:
        """See `pair_segments`."""
        norms = [norm for norm in self.each(*NORMS) if norm.inputs[NORMS[norm.op_type]].name in vectors]
        products = [product for product in self.each("FusedMatMul") if product.inputs[1].name in matrices]
        read = {product.inputs[1].name for product in products} | {norm.inputs[NORMS[norm.op_type]].name for norm in norms}
        if unread := sorted({*matrices, *vectors} - read):
            raise FusionError(f"The weight '{unread[0]}' has uses that cannot differ between router and expert: leave --shared-base out.")
        self.turn_by_segment()
        for attention in self.each("GroupQueryAttention"):
            self.attend_by_segment(attention)
        for norm in norms:
            self.scale_by_segment(norm)
        readers: dict[ir.Value, list[ir.Node]] = {}
        for product in products:
            readers.setdefault(product.inputs[0], []).append(product)
        return [self.add_delta(x, products) for x, products in readers.items()]

    def turn_by_segment(self) -> None:
        """Let rotary embeddings that are operators of their own read the positions of each segment."""
        turns = self.each("RotaryEmbedding")
        if not turns:
            return
        total = self.each("GroupQueryAttention")[0].inputs[LENGTHS][1]
        one, axis = self.constant("segments.one", 1), self.constant("segments.axis", [0])
        ranges = []
        for end, length in zip((total, self.of_expert(total)), self.lengths, strict=True):
            stop = self.before("Cast", [end], f"{end.name}.int64", [], INT64, to=int(INT64))
            count = self.before("Squeeze", [length], f"{length.name}.count", [], INT64)
            start = self.before("Sub", [stop, count], f"{end.name}.start", [], INT64)
            ranges.append(self.before("Range", [start, stop, one], f"{end.name}.positions", None, INT64))
        positions = self.before("Concat", ranges, "segments.positions", None, INT64, axis=0)
        row = self.before("Unsqueeze", [positions, axis], "segments.positions.row", None, INT64)
        for turn in turns:
            turn.replace_input_with(1, row)

    def attend_by_segment(self, attention: ir.Node) -> None:
        """Let the tokens of each segment attend to its own cache."""
        states = [None if value is None else self.split(value) for value in attention.inputs[STATES]]
        whole, *presents = attention.outputs
        router, expert = self.segments_of(whole)
        caches = [ir.Value(name=f"{EXPERT}{value.name}", type=value.type, shape=own_shape(value)) for value in presents]
        own = [self.of_expert(value) for value in (*attention.inputs[CACHES], *attention.inputs[LENGTHS])]
        inputs = [*(state and state[1] for state in states), *own, *attention.inputs[TABLES]]
        twin = ir.Node(attention.domain, attention.op_type, inputs, attention.attributes.values(), outputs=[expert, *caches])
        self.inner.outputs.extend(caches)
        for place, state in enumerate(states):
            attention.replace_input_with(place, state and state[0])
        joined = ir.Value(name=f"{whole.name}.joined", type=whole.type, shape=whole.shape)
        whole.replace_all_uses_with(joined)
        whole.name, whole.shape = router.name, router.shape
        self.inner.insert_after(attention, [twin, ir.Node("", "Concat", [whole, expert], [ir.AttrInt64("axis", 1)], outputs=[joined])])
        self.parts[joined] = whole, expert

    def scale_by_segment(self, norm: ir.Node) -> None:
        """Scale what a norm gives by its weight in the graph for the router, and by an input for the expert."""
        place, result = NORMS[norm.op_type], norm.outputs[0]
        weight = norm.inputs[place]
        own = self.input(f"{DELTA}{weight.name}", weight.shape, weight.dtype)
        norm.replace_input_with(place, self.ones(weight))
        mask = self.expert_rows(len(result.shape))
        chosen = added(self.inner, norm, "Where", [mask, own, weight], f"{weight.name}.chosen", dtype=weight.dtype or FLOAT)
        scaled = ir.Value(name=f"{result.name}.scaled", type=result.type, shape=result.shape)
        result.replace_all_uses_with(scaled)
        self.inner.insert_after(norm, ir.Node("", "Mul", [result, chosen], outputs=[scaled]))

    def add_delta(self, x: ir.Value, products: Sequence[ir.Node]) -> Factors:
        """Add x·a·b to the expert's segment of every product that reads x."""
        names = [str(product.inputs[1].name) for product in products]
        rank = f"rank.{names[0]}"
        a = self.input(f"{DELTA}{names[0]}.a", [int(x.shape[-1]), f"{len(names)}*{rank}" if len(names) > 1 else rank], x.dtype)
        narrow = added(self.inner, products[0], "MatMul", [self.split(x)[1], a], f"{a.name}.product", dtype=x.dtype or FLOAT)
        low = [narrow]
        if len(names) > 1:
            low = [ir.Value(name=f"{DELTA}{name}.low", type=x.type) for name in names]
            node(self.inner, products[0], "Split", [narrow], list(low), axis=-1, num_outputs=len(names))
        inputs = {}
        for name, product, part in zip(names, products, low, strict=True):
            b = self.input(f"{DELTA}{name}.b", [rank, int(product.outputs[0].shape[-1])], x.dtype)
            self.add_to_expert(product, part, b)
            inputs[name] = str(b.name)
        return Factors(str(a.name), inputs)

    def add_to_expert(self, product: ir.Node, low: ir.Value, b: ir.Value) -> None:
        """Add low·b to the expert's rows of a product's result."""
        result = product.outputs[0]
        delta, padded, total = (ir.Value(name=f"{result.name}.{part}", type=result.type) for part in ("delta", "padded", "total"))
        nodes = [ir.Node("", "MatMul", [low, b], outputs=[delta])]
        if result in self.parts and len(result.uses()) == 1:  # only its segments are read
            expert = self.parts[result][1]
            total.shape, splitter = expert.shape, expert.producer()
            expert.replace_all_uses_with(total)
            nodes.append(ir.Node("", "Add", [expert, delta], outputs=[total]))
            self.inner.insert_after(splitter, nodes)
            return
        total.shape = result.shape
        result.replace_all_uses_with(total)
        nodes += [ir.Node("", "Pad", [delta, self.padding], outputs=[padded]), ir.Node("", "Add", [result, padded], outputs=[total])]
        self.inner.insert_after(product, nodes)

    def split(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The segments [1, …] of a value [1, tokens, …]."""
        if value not in self.parts:
            self.parts[value] = self.segments_of(value)
            splitter = ir.Node("", "Split", [value, self.segments], [ir.AttrInt64("axis", 1)], outputs=self.parts[value])
            self.inner.insert_after(value.producer(), splitter)
        return self.parts[value]

    def segments_of(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """New values for the segments of a value."""
        router, expert = (
            ir.Value(name=f"{value.name}.{who}", type=value.type, shape=ir.Shape([1, f"{who}_tokens", *value.shape[2:]]))
            for who in ("router", "expert")
        )
        return router, expert

    def expert_rows(self, rank: int) -> ir.Value:
        """Which tokens are the expert's, bool [1, tokens, 1, …] of so many dimensions."""
        if rank not in self.masks:
            flags = [
                self.before("Expand", [self.constant(f"segments.{flag}", [flag]), length], f"{length.name}.rows.{rank}", None, BOOL)
                for flag, length in ((False, self.lengths[0]), (True, self.lengths[1]))
            ]
            row = self.before("Concat", flags, f"segments.rows.{rank}", None, BOOL, axis=0)
            axes = self.constant(f"segments.axes.{rank}", [0, *range(2, rank)])
            self.masks[rank] = self.before("Unsqueeze", [row, axes], f"segments.mask.{rank}", None, BOOL)
        return self.masks[rank]

    def ones(self, weight: ir.Value) -> ir.Value:
        """The weight of a norm that does not scale, like another one."""
        width, dtype = int(weight.shape[0]), weight.dtype or FLOAT
        name = f"ones.{width}.{dtype.name.lower()}"
        self.graph.sources[name] = Source(constant=np.ones(width, np.float32))
        return self.inner.initializers.get(name) or initializer(self.inner, name, dtype, (width,))

    def each(self, *operators: str) -> list[ir.Node]:
        """The nodes of some operators, in their order."""
        return [n for n in self.inner if n.op_type in operators]

    def before(
        self, op: str, inputs: Sequence[ir.Value], name: str, shape: list[int] | None = None, dtype: ir.DataType = FLOAT, **attributes: int
    ) -> ir.Value:
        """The result of a new node in front of all others of the graph as it was."""
        return added(self.inner, self.first, op, list(inputs), name, None if shape is None else ir.Shape(shape), dtype, **attributes)

    def constant(self, name: str, values: int | list[int] | list[bool]) -> ir.Value:
        """A small constant: int64 or bool."""
        array = np.array(values)
        return self.inner.initializers.get(name) or initializer(
            self.inner, name, ir.DataType.from_numpy(array.dtype), array.shape, ir.tensor(array, name=name)
        )

    def of_expert(self, value: ir.Value) -> ir.Value:
        """The expert's counterpart of an input of the router's."""
        name = f"{EXPERT}{value.name}"
        return next((each for each in self.inner.inputs if each.name == name), None) or self.input(name, own_shape(value), value.dtype)

    def input(self, name: str, shape: Iterable[int | str | ir.SymbolicDim], dtype: ir.DataType | None = FLOAT) -> ir.Value:
        """A new input of the graph."""
        value = ir.Value(name=name, type=ir.TensorType(dtype or FLOAT), shape=ir.Shape(shape))
        self.inner.inputs.append(value)
        return value


def own_shape(value: ir.Value) -> ir.Shape:
    """The shape of the expert's counterpart of a value: its caches may hold more tokens or fewer than the router's."""
    return ir.Shape([size if isinstance(size, int) else f"expert_{size}" for size in value.shape or ()])
