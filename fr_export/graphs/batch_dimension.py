"""Let an exported `ort` graph read one token of several texts in a pass: its batch of 1 becomes one of any size."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

SHARED = ("total_sequence_length", "logit_positions")  # inputs that all texts have in common


def batched(file: Path) -> bytes | None:
    """The graph of a file, serialised, with inputs and outputs for a batch of any size. Weights stay in their files.

    It takes one token per text, behind texts of any length, or the first tokens of one text. None where a view in it
    fixes the batch, or where it computes positions, which it then does from the length of one text.
    """
    model = ir.load(file)
    graph = model.graph
    lengths = next(value for value in graph.inputs if value.name == SHARED[0])
    if any(user.op_type != "GroupQueryAttention" for user in lengths.consumers()):
        return None
    if not all(freed(node) for node in list(graph) if node.op_type == "Reshape"):
        return None
    for value in (value for node in graph for value in node.outputs if not value.is_graph_output()):
        value.shape = None
    for value in (*graph.inputs, *graph.outputs):
        if value.name not in SHARED and value.shape is not None:
            value.shape = ir.Shape(["batch", *list(value.shape)[1:]])
    serialised: bytes = ir.serde.serialize_model(model).SerializeToString()
    return serialised


def freed(view: ir.Node) -> bool:
    """Whether a Reshape keeps its input's first dimension; one whose constant says 1 is changed to do so."""
    shape = view.inputs[1]
    constant = ir.convenience.get_const_tensor(shape) if shape is not None else None
    if constant is None or view.graph is None or constant.numpy()[0] not in (0, 1):
        return False
    sizes = np.array([0, *constant.numpy()[1:]], np.int64)
    name = f"{view.outputs[0].name}.shape"
    keeping = ir.Value(
        name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(sizes.shape), const_value=ir.tensor(sizes, name=name)
    )
    view.graph.initializers[name] = keeping
    view.replace_input_with(1, keeping)
    return True
