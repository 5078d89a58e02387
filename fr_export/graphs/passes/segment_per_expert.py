"""A graph for router and expert becomes one for the router and all experts: whoever has a segment in a pass reads in it.

Every expert has caches and factors of its own. Operators return at once where a segment is empty, so a pass costs what
those cost that read. Attention alone takes no empty segment: it stands in a branch of its own.
"""

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.graphs.graph import added, initializer, node
from fusionroute.fr_export.graphs.passes.pair_segments import CACHES
from fusionroute.runtime.limits import DELTA, EXPERT, numbered

SEGMENTS, AXIS = "segments", "axis"
FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


def segment_per_expert(model: ir.Model, experts: int) -> None:
    """Rewrite a graph as `pair_segments` leaves it, without vectors and without a head.

    `segments` becomes int64 [experts + 2]: how many tokens of `input_ids` are the router's, each expert's, and padding
    behind them, which only makes their number even. Each but the sum may be 0. Inputs and outputs that were the expert's
    are there for each expert, under the names that `numbered` gives them.
    """
    _Segments(model.graph, experts).run()


class _Segments:
    """One rewrite. `own` holds what stands for a value of the expert's: one for each expert."""

    def __init__(self, inner: ir.Graph, experts: int):
        self.inner, self.experts = inner, experts
        self.own: dict[ir.Value, list[ir.Value]] = {}
        self.whose: dict[ir.Value, int] = {}  # an expert's value → the place of its segment; the router's is 0
        self.paddings: dict[int, ir.Value] = {}  # by their width
        self.flags: dict[int, ir.Value] = {}  # by the places of their segments
        self.segments = next(value for value in inner.inputs if value.name == SEGMENTS)
        self.segments.shape = ir.Shape([experts + 2])
        self.lengths: list[ir.Value] = []

    def run(self) -> None:
        """See `segment_per_expert`."""
        for values in (self.inner.inputs, self.inner.outputs):
            several = [self.of_each(value) if str(value.name).startswith((EXPERT, DELTA)) else [value] for value in values]
            values[:] = [value for own in several for value in own]
        originals = list(self.inner)
        replaced = [each for each in originals if self.replaces(each)]
        for each in reversed(replaced):
            self.inner.remove(each, safe=True)
        for attention in [each for each in self.inner if each.op_type == "GroupQueryAttention"]:
            self.read_if_any(attention)

    def replaces(self, each: ir.Node) -> bool:
        """Let a node serve every expert, or put others in its place: whether it is to be removed."""
        if each.op_type == "Split" and self.segments in each.inputs:
            self.split(each)
        elif not any(value in self.own for value in each.inputs):
            return False
        elif each.op_type == "Concat":
            self.join(each)
        elif each.op_type == "ScatterND":
            delta = each.inputs[2]
            deltas = added(self.inner, each, "Concat", list(self.own[delta]), f"{delta.name}.joined", dtype=delta.dtype or FLOAT, axis=1)
            each.replace_input_with(2, deltas)
            return False
        elif each.op_type == "Add" and each.inputs[0] not in self.own:
            self.sum(each)
        else:
            self.repeat(each)
        return True

    def split(self, each: ir.Node) -> None:
        """A value's segments, or their lengths."""
        router, expert = each.outputs
        first = self.stand_in(router, router.name)
        padding = ir.Value(name=f"{expert.name}.padding", type=expert.type)
        parts, axis = [first, *self.of_each(expert), padding], each.attributes[AXIS].as_int()
        if each.inputs[0] is self.segments:
            self.lengths = parts
            node(self.inner, each, "Split", list(each.inputs), parts, axis=axis, num_outputs=len(parts))
            return
        node(self.inner, each, "Split", list(each.inputs), parts, axis=axis)

    def join(self, each: ir.Node) -> None:
        """All segments in a row, with zeros for the padding."""
        router, expert = each.inputs
        (result,), axis = each.outputs, each.attributes[AXIS].as_int()
        parts = [router, *self.own[expert], self.padding(int(result.shape[-1]) if axis else 0)]
        node(self.inner, each, "Concat", parts, [self.stand_in(result, result.name)], axis=axis)

    def padding(self, width: int) -> ir.Value:
        """Zeros for each token of padding: float32 [1, tokens, width]; without a width int64 [tokens]."""
        if width not in self.paddings:
            length, kind = self.lengths[-1], FLOAT if width else INT64
            name, behind = f"{SEGMENTS}.padding.{width}", length.producer()
            nodes, shape = [], length
            if width:
                shape = ir.Value(name=f"{name}.shape", type=ir.TensorType(INT64), shape=ir.Shape([3]))
                ends = [self.constant(f"{name}.{end}", size) for end, size in (("batch", 1), ("width", width))]
                nodes.append(ir.Node("", "Concat", [ends[0], length, ends[1]], [ir.AttrInt64(AXIS, 0)], outputs=[shape]))
            zeros = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape([1, None, width] if width else [None]))
            zero = ir.AttrTensor("value", ir.tensor([0], dtype=kind))
            self.inner.insert_after(behind, [*nodes, ir.Node("", "ConstantOfShape", [shape], [zero], outputs=[zeros])])
            self.paddings[width] = zeros
        return self.paddings[width]

    def sum(self, each: ir.Node) -> None:
        """What a value gains by all experts."""
        total, own = each.inputs
        (result,) = each.outputs
        *others, last = self.own[own]
        for number, value in enumerate(others):
            total = added(self.inner, each, "Add", [total, value], numbered(number, str(result.name)), result.shape, result.dtype or FLOAT)
        node(self.inner, each, "Add", [total, last], [self.stand_in(result, result.name)])

    def repeat(self, each: ir.Node) -> None:
        """A node for each expert."""
        outputs = list(zip(*map(self.of_each, each.outputs), strict=True))
        for number in range(self.experts):
            inputs = [self.own[value][number] if value in self.own else value for value in each.inputs]
            fresh = ir.Node(each.domain, each.op_type, inputs, each.attributes.values(), outputs=outputs[number])
            self.inner.insert_before(each, fresh)

    def read_if_any(self, attention: ir.Node) -> None:
        """Let a segment's attention run where the segment has tokens. Elsewhere its caches stay as they are."""
        caches, results = attention.inputs[CACHES], attention.outputs
        place = self.whose.get(caches[0], 0)
        read = [self.like(result, f"{result.name}.read") for result in results]
        idle = [self.like(result, f"{result.name}.idle") for result in results]
        nothing = ir.tensor(np.zeros((1, 0, int(results[0].shape[-1])), np.float32))
        unchanged = [ir.Node("", "Identity", [cache], outputs=[value]) for cache, value in zip(caches, idle[1:], strict=True)]
        branches = {
            "then_branch": [ir.Node(attention.domain, attention.op_type, attention.inputs, attention.attributes.values(), outputs=read)],
            "else_branch": [ir.Node("", "Constant", [], [ir.AttrTensor("value", nothing)], outputs=idle[:1]), *unchanged],
        }
        attributes = [
            ir.AttrGraph(name, ir.Graph([], outputs, nodes=nodes, name=f"{results[0].name}.{name}"))
            for (name, nodes), outputs in zip(branches.items(), (read, idle), strict=True)
        ]
        outputs = [self.stand_in(result, result.name) for result in results]
        self.inner.insert_before(attention, ir.Node("", "If", [self.flag(place)], attributes, outputs=outputs))
        self.inner.remove(attention, safe=True)

    def flag(self, place: int) -> ir.Value:
        """Whether a segment has tokens, bool [1]."""
        if place not in self.flags:
            length = self.lengths[place]
            flag = ir.Value(name=f"{length.name}.any", type=ir.TensorType(BOOL), shape=ir.Shape([1]))
            self.inner.insert_after(
                length.producer(), ir.Node("", "Greater", [length, self.constant(f"{SEGMENTS}.none", 0)], outputs=[flag])
            )
            self.flags[place] = flag
        return self.flags[place]

    def of_each(self, value: ir.Value) -> list[ir.Value]:
        """What stands for a value of the expert's. Sizes with names are each expert's own."""
        self.own[value] = []
        for number in range(self.experts):
            dims = value.shape and [size if isinstance(size, int) else numbered(number, str(size)) for size in value.shape]
            fresh = ir.Value(name=numbered(number, str(value.name)), type=value.type, shape=dims and ir.Shape(dims))
            self.own[value].append(fresh)
            self.whose[fresh] = number + 1
        return self.own[value]

    def like(self, value: ir.Value, name: str) -> ir.Value:
        """A value of the same type and shape."""
        return ir.Value(name=name, type=value.type, shape=value.shape)

    def stand_in(self, value: ir.Value, name: str | None) -> ir.Value:
        """A value of that name for all who read another one."""
        fresh = ir.Value(name=name, type=value.type, shape=value.shape)
        value.name = None
        value.replace_all_uses_with(fresh, replace_graph_outputs=True)
        return fresh

    def constant(self, name: str, value: int) -> ir.Value:
        """An int64 constant [1]."""
        known = self.inner.initializers.get(name)
        return known or initializer(self.inner, name, INT64, (1,), ir.tensor([value], dtype=INT64, name=name))
