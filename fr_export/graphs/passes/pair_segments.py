"""One pass for router and expert: a graph that reads two segments of one sequence, the router's tokens before the
expert's, so that every product reads its weights once for both.

Attention runs once per segment, with a KV cache for each. What sets an expert apart from the weights in the graph comes
in through inputs, so that another expert is another binding: low-rank factors of its matrices, and whole vectors.
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.factors import LOOKUP, Factors
from fusionroute.fr_export.graphs.graph import Graph, Source, added, initializer, node
from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.limits import DELTA, EXPERT

ROWS = "logit_positions"
NORMS = {"SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 2}  # operator → which input is its weight
STATES, CACHES, LENGTHS, TABLES = slice(0, 3), slice(3, 5), slice(5, 7), slice(7, None)  # inputs of GroupQueryAttention
FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


def pair_segments(graph: Graph, matrices: Collection[str], vectors: Collection[str]) -> list[Factors]:
    """Rewrite a graph of the `ort` dialect, as `finish` leaves it and before it has weights.

    `matrices` and `vectors` are the initialisers that experts change. The graph gains the inputs `segments` int64 [2],
    how many tokens of `input_ids` are the router's and the expert's (neither may be 0); the inputs and outputs of
    attention once more, named `expert.…`; those of the factors, which it returns; and for each vector `delta.{name}`,
    its values for the expert.

    Raises FusionError for a weight that no product, look-up, norm or bias reads.
    """
    return _Pairing(graph).run(matrices, vectors)


class _Pairing:
    """One rewrite. `parts` holds the segments of each value that was split, or that is made of segments."""

    def __init__(self, graph: Graph):
        self.graph, self.inner = graph, graph.model.graph
        self.parts: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self.masks: dict[int, ir.Value] = {}
        self.answers: ir.Value | None = None
        self.pads: ir.Value | None = None
        self.rows = next(value for value in self.inner.inputs if value.name == ROWS)
        self.positions = str(self.rows.shape[0])  # the name of that dimension
        self.first = next(iter(self.inner))  # what depends on the segments' lengths alone is computed before it
        self.segments = self.input("segments", [2], INT64)
        self.lengths = [ir.Value(name=f"segments.{who}", type=ir.TensorType(INT64), shape=ir.Shape([1])) for who in ("router", "expert")]
        node(self.inner, self.first, "Split", [self.segments], list(self.lengths), num_outputs=2, axis=0)
        self.counts = [self.before("Squeeze", [length], f"{length.name}.count", [], INT64) for length in self.lengths]
        self.places = self.expert_places()

    def run(self, matrices: Collection[str], vectors: Collection[str]) -> list[Factors]:
        """See `pair_segments`."""
        norms = [norm for norm in self.each(*NORMS) if norm.inputs[NORMS[norm.op_type]].name in vectors]
        shifts = [shift for shift in self.each("Add") if shift.inputs[1].name in vectors]
        products = [product for product in self.each("FusedMatMul") if product.inputs[1].name in matrices]
        lookups = [lookup for lookup in self.each("Gather") if lookup.inputs[0].name in matrices]
        read = {each.inputs[1].name for each in (*products, *shifts)} | {lookup.inputs[0].name for lookup in lookups}
        read |= {norm.inputs[NORMS[norm.op_type]].name for norm in norms}
        if unread := sorted({*matrices, *vectors} - read):
            raise FusionError(f"The weight '{unread[0]}' has uses that cannot differ between router and expert: leave --shared-base out.")
        self.turn_by_segment()
        for attention in self.each("GroupQueryAttention"):
            self.attend_by_segment(attention)
        for norm in norms:
            self.scale_by_segment(norm)
        for shift in shifts:
            shift.replace_input_with(1, self.chosen(shift.inputs[1], shift))
        readers: dict[ir.Value, list[ir.Node]] = {}
        for product in products:
            readers.setdefault(product.inputs[0], []).append(product)
        return [*map(self.add_to_lookup, lookups), *(self.add_delta(x, own) for x, own in readers.items())]

    def turn_by_segment(self) -> None:
        """Let rotary embeddings that are operators of their own read the positions of each segment."""
        turns = self.each("RotaryEmbedding")
        if not turns:
            return
        total = self.each("GroupQueryAttention")[0].inputs[LENGTHS][1]
        one, axis = self.constant("segments.one", 1), self.constant("segments.axis", [0])
        ranges = []
        for end, count in zip((total, self.of_expert(total)), self.counts, strict=True):
            stop = self.before("Cast", [end], f"{end.name}.int64", [], INT64, to=int(INT64))
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
        norm.replace_input_with(place, self.ones(weight))
        chosen = self.chosen(weight, norm)
        scaled = ir.Value(name=f"{result.name}.scaled", type=result.type, shape=result.shape)
        result.replace_all_uses_with(scaled)
        self.inner.insert_after(norm, ir.Node("", "Mul", [result, chosen], outputs=[scaled]))

    def chosen(self, vector: ir.Value, reader: ir.Node) -> ir.Value:
        """A vector of the graph for the router's tokens, and an input for the expert's."""
        own = self.input(f"{DELTA}{vector.name}", vector.shape, vector.dtype)
        rows = self.expert_rows(len(reader.outputs[0].shape))
        return added(self.inner, reader, "Where", [rows, own, vector], f"{vector.name}.chosen", dtype=vector.dtype or FLOAT)

    def add_to_lookup(self, lookup: ir.Node) -> Factors:
        """Add rows of a·b to the expert's segment of the embedding's rows."""
        table, ids = lookup.inputs
        name = f"{table.name}{LOOKUP}"
        vocabulary, width = map(int, table.shape)
        if ids not in self.parts:
            self.parts[ids] = self.segments_of(ids)
            node(self.inner, self.first, "Split", [ids, self.segments], list(self.parts[ids]), axis=1)
        a, b = self.input(f"{DELTA}{name}.a", [vocabulary, f"rank.{name}"]), self.input(f"{DELTA}{name}.b", [f"rank.{name}", width])
        low = added(self.inner, lookup, "Gather", [a, self.parts[ids][1]], f"{a.name}.rows", axis=0)
        self.add_to_expert(lookup, low, b)
        return Factors(str(a.name), {name: str(b.name)})

    def add_delta(self, x: ir.Value, products: Sequence[ir.Node]) -> Factors:
        """Add x·a·b to the expert's rows of every product that reads x."""
        names = [str(product.inputs[1].name) for product in products]
        rank = f"rank.{names[0]}"
        a = self.input(f"{DELTA}{names[0]}.a", [int(x.shape[-1]), f"{len(names)}*{rank}" if len(names) > 1 else rank], x.dtype)
        answers = str(x.shape[1]) == self.positions
        rows = x if answers else self.split(x)[1]
        narrow = added(self.inner, products[0], "MatMul", [rows, a], f"{a.name}.product", dtype=x.dtype or FLOAT)
        if answers:  # rows of both, at positions within the whole pass
            narrow = added(
                self.inner, products[0], "Where", [self.expert_answers(), narrow, self.constant("segments.zero", 0.0)], f"{a.name}.expert"
            )
        low = [narrow]
        if len(names) > 1:
            low = [ir.Value(name=f"{DELTA}{name}.low", type=x.type) for name in names]
            node(self.inner, products[0], "Split", [narrow], list(low), axis=-1, num_outputs=len(names))
        inputs = {}
        for name, product, part in zip(names, products, low, strict=True):
            b = self.input(f"{DELTA}{name}.b", [rank, int(product.outputs[0].shape[-1])], x.dtype)
            if answers:
                self.add_to_all(product, part, b)
            else:
                self.add_to_expert(product, part, b)
            inputs[name] = str(b.name)
        return Factors(str(a.name), inputs)

    def add_to_expert(self, product: ir.Node, low: ir.Value, b: ir.Value) -> None:
        """Add low·b to the expert's rows of a product's result."""
        result = product.outputs[0]
        delta, total = (ir.Value(name=f"{result.name}.{part}", type=result.type) for part in ("delta", "total"))
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
        if result.dtype == FLOAT:
            # in place, and it does not touch the router's rows: half the time of padding the delta and adding it
            nodes.append(ir.Node("", "ScatterND", [result, self.places, delta], [ir.AttrString("reduction", "add")], outputs=[total]))
        else:  # on the CPU, ONNX Runtime adds in fp32 alone
            padded = ir.Value(name=f"{result.name}.padded", type=result.type)
            nodes += [ir.Node("", "Pad", [delta, self.padding()], outputs=[padded]), ir.Node("", "Add", [result, padded], outputs=[total])]
        self.inner.insert_after(product, nodes)

    def padding(self) -> ir.Value:
        """Rows of the router's in front of the expert's, as Pad takes them."""
        if self.pads is None:
            begins, ends = self.constant("segments.begin", [0]), self.constant("segments.end", [0, 0, 0, 0])
            self.pads = self.before("Concat", [begins, self.lengths[0], ends], "segments.pads", [6], INT64, axis=0)
        return self.pads

    def expert_places(self) -> ir.Value:
        """Where the expert's tokens are in a value [1, tokens, …], int64 [1, expert tokens, 2]."""
        first = self.counts[0]
        stop = self.before("Add", list(self.counts), "segments.stop", [], INT64)
        rows = self.before("Range", [first, stop, self.constant("segments.one", 1)], "segments.expert.rows", None, INT64)
        column = self.before("Unsqueeze", [rows, self.constant("segments.ends", [0, 2])], "segments.expert.column", None, INT64)
        padding = self.constant("segments.padding", [0, 0, 1, 0, 0, 0])  # the batch's place 0 in front
        return self.before("Pad", [column, padding], "segments.expert.places", None, INT64)

    def add_to_all(self, product: ir.Node, low: ir.Value, b: ir.Value) -> None:
        """Add low·b to all rows of a product's result."""
        result = product.outputs[0]
        delta, total = (ir.Value(name=f"{result.name}.{part}", type=result.type, shape=result.shape) for part in ("delta", "total"))
        result.replace_all_uses_with(total, replace_graph_outputs=True)
        result.name, total.name = f"{result.name}.base", result.name
        self.inner.insert_after(
            product, [ir.Node("", "MatMul", [low, b], outputs=[delta]), ir.Node("", "Add", [result, delta], outputs=[total])]
        )

    def expert_answers(self) -> ir.Value:
        """Which rows of logits are the expert's, bool [1, positions, 1]."""
        if self.answers is None:
            behind = self.before("GreaterOrEqual", [self.rows, self.lengths[0]], "segments.answers.flags", None, BOOL)
            axes = self.constant("segments.answers.axes", [0, 2])
            self.answers = self.before("Unsqueeze", [behind, axes], "segments.answers", None, BOOL)
        return self.answers

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

    def constant(self, name: str, values: int | float | list[int] | list[bool]) -> ir.Value:
        """A small constant: int64, bool or float32."""
        array = np.array(values, np.float32 if isinstance(values, float) else None)
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
