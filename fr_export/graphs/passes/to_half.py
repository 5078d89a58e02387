"""Half precision throughout: activations, KV buffers and rotary tables of a traced graph become fp16 or bf16, with
islands in fp32.

The outputs `logits` and `hidden` (of which the routing head is made) stay fp32, and so does all that follows the
product of the LM head. With `wide` also the residual stream, for families whose stream leaves fp16's range (65,504;
there bf16 has steps of 512): embedding scale, additions and norms are fp32, and values are narrowed in front of
products only. Rotary embeddings by tables are computed in fp32, unless an attention operator does it.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fusionroute.fr_export.graphs.graph import Graph, initializer, node

FLOAT = ir.DataType.FLOAT
NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization")
IN_HALF = ("FusedMatMul", "MatMul", "GroupQueryAttention", "Attention", "TensorScatter")
# what attention in primitive operators has between its products, and rotary by tables
IN_FLOAT = ("Tanh", "Where", "Softmax", "RotaryEmbedding")
SMALLEST_DIVISOR = 1e-30  # a token whose values are all zero is divided by this


def to_half(graph: Graph, half: ir.DataType, wide: bool, wide_scores: bool = False) -> None:
    """Rewrite a graph as `trace` returns it, before it has weights; `half` is FLOAT16 or BFLOAT16.

    `wide_scores`: where attention is written out in primitive operators, products of queries and keys are fp32. An
    attention operator adds up in fp32 by itself.

    What does not depend on the tokens' embeddings (positions, rotary angles) is computed in fp32, and rounded where it
    meets what does.
    """
    _Narrowing(graph, half, wide, score_products(graph) if wide_scores else set()).run()


def score_products(graph: Graph) -> set[ir.Node]:
    """The products of queries and keys: those that reach a Softmax without another product between."""
    products: set[ir.Node] = set()
    seen: set[ir.Node] = set()
    makers = [n.inputs[0].producer() for n in graph.model.graph if n.op_type == "Softmax"]
    while makers:
        maker = makers.pop()
        if maker is None or maker in seen:
            continue
        seen.add(maker)
        if maker.op_type == "MatMul":
            products.add(maker)
        else:
            makers += [value.producer() for value in maker.inputs if value is not None]
    return products


class _Narrowing:
    """One pass in the graph's order. `types` holds the type of every value that depends on the tokens' embeddings."""

    def __init__(self, graph: Graph, half: ir.DataType, wide: bool, scores: set[ir.Node]):
        self.graph, self.half, self.wide, self.scores = graph, half, wide, scores
        self.inner = graph.model.graph
        self.types: dict[ir.Value, ir.DataType] = {}
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.settled: set[ir.Value] = set()  # initialisers that have their type

    def run(self) -> None:
        """Narrow every node, then widen the outputs."""
        hidden = self.inner.outputs[1]
        heads = [n for n in hidden.consumers() if n.op_type == "FusedMatMul"]
        for value in self.inner.inputs:
            if "past" in value.name:  # a pair's expert has caches of its own
                self._set(value, self.half)
        for n in list(self.inner):
            if n.op_type == "Gather" and (source := self.graph.sources.get(n.inputs[0].name)) is not None:
                if source.constant is not None:  # rows of a rotary table: what meets them is computed in fp32
                    self.types[n.outputs[0]] = FLOAT
                    continue
                n.replace_input_with(0, self._as(n.inputs[0], self.half, n))
                self._set(n.outputs[0], self.half)
                if self.wide:
                    self._widen_all(n.outputs[0])
            elif n.op_type != "Shape" and any(value in self.types for value in n.inputs):
                self._convert(n)
                if n in heads:
                    self._widen_all(n.outputs[0])
        if self.types[hidden] != FLOAT:  # the LM head goes on reading it in half precision
            self.inner.outputs[1] = self._swap_name(hidden, self._cast(hidden, FLOAT, None))
        for place, value in enumerate(list(self.inner.outputs)):
            if "new." in str(value.name) and self.types[value] != self.half:  # rows of the KV buffers
                name, rows = value.name, self._cast(value, self.half, None)
                value.name, rows.name = f"{name}.float", name
                self.inner.outputs[place] = rows
        RemoveUnusedNodesPass()(self.graph.model)

    def _convert(self, n: ir.Node) -> None:
        """Choose the type that a node computes in, and cast its inputs."""
        active = [self.types[value] for value in n.inputs if value in self.types]
        if n in self.scores:
            dtype = FLOAT
        elif n.op_type in IN_HALF or any(value.is_graph_input() for value in n.inputs if value in self.types):  # a KV buffer
            dtype = self.half
        elif n.op_type in IN_FLOAT or (self.wide and (n.op_type in NORMS or (n.op_type == "Mul" and _gated(n, self.types)))):
            dtype = FLOAT
        else:
            dtype = FLOAT if FLOAT in active else self.half
        narrow_range = self.wide and self.half == ir.DataType.FLOAT16
        scale = self._divide(n) if narrow_range and n.op_type == "FusedMatMul" and _gated(n.inputs[0].producer(), self.types) else None
        for place, value in enumerate(n.inputs):
            if value is not None and (value in self.types or _floating(value)):
                n.replace_input_with(place, self._as(value, dtype, n))
        for value in n.outputs:
            if value.name:
                self._set(value, dtype)
        if scale is not None:
            self._multiply(n, scale)

    def _divide(self, product: ir.Node) -> ir.Value:
        """Divide a product's input by each token's largest |value|; returns that, fp32 [1, S, 1].

        gate · up is the one input of a product that no norm bounds: in fp16 it would overflow before down_proj, or in
        its sums.
        """
        x = product.inputs[0]
        axis, tiny = self._constant("last_axis", np.array([-1], np.int64)), self._constant("tiny", np.array(SMALLEST_DIVISOR, np.float32))
        size, largest, scale, scaled = (ir.Value(name=f"{x.name}.{part}") for part in ("abs", "largest", "scale", "scaled"))
        node(self.inner, product, "Abs", [x], [size])
        node(self.inner, product, "ReduceMax", [size, axis], [largest], keepdims=1)
        node(self.inner, product, "Max", [largest, tiny], [scale])
        node(self.inner, product, "Div", [x, scale], [scaled])
        scaled.shape = x.shape
        self._set(scaled, FLOAT)
        product.replace_input_with(0, scaled)
        return scale

    def _multiply(self, product: ir.Node, scale: ir.Value) -> None:
        """Undo `_divide` behind the product, in fp32."""
        result = product.outputs[0]
        restored = ir.Value(name=f"{result.name}.restored", shape=result.shape)
        result.replace_all_uses_with(restored)
        wide = ir.Value(name=f"{result.name}.fp32", type=ir.TensorType(FLOAT), shape=result.shape)
        after = ir.Node("", "Cast", [result], [ir.AttrInt64("to", int(FLOAT))], outputs=[wide])
        self.inner.insert_after(product, [after, ir.Node("", "Mul", [wide, scale], outputs=[restored])])
        self._set(restored, FLOAT)

    def _as(self, value: ir.Value, dtype: ir.DataType, before: ir.Node | None) -> ir.Value:
        """The value in a type: itself, an initialiser retyped for its first reader, or a cast that all its readers
        share.
        """
        if value.name in self.graph.sources and value not in self.settled:
            value.type = ir.TensorType(dtype)
            self.settled.add(value)
        return value if (value.dtype or FLOAT) == dtype else self._cast(value, dtype, before)

    def _cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node | None) -> ir.Value:
        key = (value, dtype)
        if key not in self.casts:
            cast = ir.Value(name=f"{value.name}.{dtype.name.lower()}", type=ir.TensorType(dtype), shape=value.shape)
            node(self.inner, before, "Cast", [value], [cast], to=int(dtype))
            if value in self.types:
                self._set(cast, dtype)
            self.casts[key] = cast
        return self.casts[key]

    def _widen_all(self, value: ir.Value) -> None:
        """Let every reader of a value, the graph's outputs too, read it in fp32."""
        wide = ir.Value(name=f"{value.name}.float", shape=value.shape)
        value.replace_all_uses_with(wide, replace_graph_outputs=True)
        self.inner.insert_after(value.producer(), ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(FLOAT))], outputs=[wide]))
        self._set(wide, FLOAT)
        if wide.is_graph_output():
            self._swap_name(value, wide)

    def _swap_name(self, value: ir.Value, wide: ir.Value) -> ir.Value:
        """Give the fp32 form of an output its name."""
        name = value.name
        value.name, wide.name = f"{name}.{self.half.name.lower()}", name
        return wide

    def _set(self, value: ir.Value, dtype: ir.DataType) -> None:
        value.type = ir.TensorType(dtype)  # replaced, not changed: clones share it
        self.types[value] = dtype

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        constant = self.inner.initializers.get(name)
        return constant or initializer(self.inner, name, ir.DataType.from_numpy(array.dtype), array.shape, ir.tensor(array, name=name))


def _gated(n: ir.Node | None, types: dict[ir.Value, ir.DataType]) -> bool:
    """Whether a node multiplies two activations and feeds a product: gate · up."""
    return (
        n is not None
        and n.op_type == "Mul"
        and all(value in types for value in n.inputs)
        and any(user.op_type == "FusedMatMul" for user in n.outputs[0].consumers())
    )


def _floating(value: ir.Value) -> bool:
    """Whether a value that depends on no embedding is fp32; traced constants have no type of their own."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant":
        return "value" in producer.attributes and producer.attributes["value"].as_tensor().dtype == FLOAT
    return value.dtype in (FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
