"""What 8-bit activations cost: one product's input is rounded, and the output of its decoder block compared."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir

from fusionroute.calibration.block import Block
from fusionroute.calibration.blockwise_forward import BlockwiseForward
from fusionroute.calibration.observers import LEVELS, Observer
from fusionroute.fr_export.graphs.decoder_blocks import reader, split
from fusionroute.fr_export.graphs.graph import initializer, node
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.residual_error import residual_error, residual_stream, sample

TOKENS = 1024  # read for the measurement
STEP = ".step"  # of a matrix's name: the step of its input's 8-bit values


def measure(context: FitContext, observed: Mapping[str, Observer]) -> dict[str, float]:
    """Matrix of a decoder block → `residual_error` of rounding its input to steps of absmax / 127. Empty for a model
    without texts.

    `observed` (matrix → what enters it) are statistics of this very graph, which `smooth` may have changed since
    `evidence` was gathered.
    """
    texts = sample(context.evidence.texts, TOKENS)
    if not texts:
        return {}
    embed, read = reader(context.graph, context.weights)
    off = np.zeros(1, np.float32)
    walk = BlockwiseForward(
        [stepped(block) for block in split(context.graph)],
        texts,
        embed,
        lambda name: off if name.endswith(STEP) else read(name),
        context.threads,
    )
    noise = {}
    while walk.position < len(walk.blocks) - 1:
        passed_on = walk.peek()
        exact = residual_stream(passed_on)
        for matrix in walk.block.channels:
            step = np.array([observed[matrix].absmax() / LEVELS], np.float32)
            noise[matrix] = residual_error(walk.peek({matrix + STEP: step}), exact)
        walk.move(passed_on)
    return noise


def stepped(block: Block) -> Block:
    """A block with one more weight per matrix, float32 [1]: the step that the product's input is rounded to, 0 for not
    at all.
    """
    model = ir.serde.deserialize_model(onnx.load_model_from_string(block.graph))
    inner = model.graph
    scalars = {
        name: initializer(inner, name, ir.DataType.FLOAT, (), ir.tensor(np.array(value, np.float32), name=name))
        for name, value in (("level.low", -LEVELS), ("level.high", LEVELS), ("step.none", 0))
    }
    weights = dict(block.weights)
    for product in [n for n in inner if n.op_type == "FusedMatMul" and n.inputs[1].name in block.weights]:
        x, given = product.inputs[0], product.inputs[1].name
        step = ir.Value(name=given + STEP, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
        inner.inputs.append(step)
        weights[step.name] = block.weights[given] + STEP

        def inserted(op: str, *inputs: ir.Value, before: ir.Node = product, at: str = given) -> ir.Value:
            result = ir.Value(name=f"{at}.{op}")
            node(inner, before, op, list(inputs), [result])
            return result

        levels = inserted("Clip", inserted("Round", inserted("Div", x, step)), scalars["level.low"], scalars["level.high"])
        product.replace_input_with(0, inserted("Where", inserted("Greater", step, scalars["step.none"]), inserted("Mul", levels, step), x))
    return replace(block, graph=ir.serde.serialize_model(model).SerializeToString(deterministic=True), weights=weights)
