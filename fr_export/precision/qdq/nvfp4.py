"""nvfp4 for TensorRT: E2M1 weights and activations in blocks of 16, each block with an E4M3 scale, each tensor with an fp32
one (4.5 bits per weight).

As NVIDIA describes it, https://developer.nvidia.com/blog/introducing-nvfp4-for-efficient-and-accurate-low-precision-inference/,
and as nvidia-modelopt 0.47 writes it: DequantizeLinear of the scales, then of the values in blocks. Blocks of activations
get their scales while the engine runs (`trt::TRT_FP4DynamicQuantize`); calibration gives the tensor's. Head and embedding,
and matrices whose width is no multiple of 16, are in FP8.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from fusionroute.calibration.observers import Observer
from fusionroute.fr_export.graphs.decoder_blocks import layer
from fusionroute.fr_export.graphs.graph import Graph, added, initializer, users
from fusionroute.fr_export.graphs.source_rows import rows as rows_of
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import pack
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.qdq.dequantise import first_user, widen
from fusionroute.fr_export.precision.qdq.fp8 import E4M3, FittedFp8, Fp8
from fusionroute.fr_export.precision.qdq.fp8 import LARGEST as LARGEST_SCALE
from fusionroute.fr_export.precision.scheme import Fitted, Schemes

E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
BLOCK = 16
LARGEST = np.float32(6)  # of E2M1
SHARES = (1.0, 0.75)  # of LARGEST, that a block's largest value becomes: above 4 the steps are widest
DOMAIN = "trt"  # of TensorRT's own operators


class Nvfp4(Fp8):
    """4-bit weights and activations, whose scales calibration gives."""

    name = "nvfp4"
    bits = 4.5

    def fit(self, context: FitContext) -> tuple[Graph, Fitted]:
        """Find the scale of each matrix, and take those of activations from calibration; see `scheme.Fitting`."""
        graph, largest = context.graph, {}
        for name, value in graph.model.graph.initializers.items():
            if name in graph.sources and in_four_bits(graph, value):
                parts = rows_of(graph.sources[name], context.weights)
                largest[name] = max(float(np.abs(part).max(initial=0)) for part in parts)
        return graph, FittedNvfp4(context.evidence.observed, largest)


def in_four_bits(graph: Graph, matrix: ir.Value) -> bool:
    """Whether a matrix is one of a layer's that blocks fit."""
    if len(matrix.shape) != 2 or int(matrix.shape[1]) % BLOCK:
        return False
    products, lookups = users(matrix)
    return bool(products) and not lookups and layer(graph, matrix) != graph.layers  # the head's


class FittedNvfp4:
    """One model's weights and activations. largest: matrix in 4 bits → its largest |weight|."""

    name, bits = Nvfp4.name, Nvfp4.bits

    def __init__(self, observed: Mapping[str, Observer], largest: Mapping[str, float]):
        self._others = FittedFp8(observed)
        self._scales = {matrix: tensor_scale(size) for matrix, size in largest.items()}
        self._inputs = {matrix: tensor_scale(seen.absmax()) for matrix, seen in observed.items() if seen.rows and matrix in largest}

    @property
    def about(self) -> dict[str, Any]:
        """How many matrices are in 4 bits, and how many of them have such inputs."""
        return {"nvfp4_matrices": len(self._scales), "nvfp4_inputs": len(self._inputs)}

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Round `matrix` [out, in] slice by slice, and what enters its products. Raises InputError as `Writer.write`."""
        inner, name = graph.model.graph, str(matrix.name)
        if name not in self._scales:
            self._others.bind(graph, matrix, rows, store)
            return
        shapes = [(out := int(matrix.shape[0]), int(matrix.shape[1])), (out, int(matrix.shape[1]) // BLOCK)]
        types = [ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN]
        with store.writer(name) as values, store.writer(name) as steps:
            for part in rows:
                rounded, scales = rounded_blocks(part, self._scales[name])
                values.write(pack(rounded.view(np.uint8), 4))
                steps.write(scales.view(np.uint8))
        inner.opset_imports.setdefault(DOMAIN, 1)
        stored = [
            initializer(inner, f"{name}.{kind}", dtype, shape, blob.tensor(f"{name}.{kind}", dtype, shape))
            for kind, dtype, shape, blob in zip(("fp4", "steps"), types, shapes, (values.blob, steps.blob), strict=True)
        ]
        scale = widened_scale(inner, first_user(matrix), stored[1], self._scales[name], name, matrix.dtype)

        def enter(product: ir.Node) -> ir.Value:
            return rounded_input(inner, product, self._inputs[name])

        widen(graph, matrix, stored[0], scale, enter if name in self._inputs else None, axis=1, block_size=BLOCK)


def tensor_scale(largest: float) -> np.ndarray:
    """The fp32 scale [] at which the largest value takes the largest block scale: max / (6 · 448); 1 for zeros."""
    return np.asarray(np.float32(largest) / (LARGEST * LARGEST_SCALE) or 1.0, np.float32)


def rounded_blocks(rows: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 rows [R, K] to nearest: E2M1 [R, K], and E4M3 scales [R, K/16] of the least squared error, in units of `scale`."""
    blocks = rows.reshape(len(rows), -1, BLOCK)
    largest = np.maximum(blocks.max(-1), -blocks.min(-1))
    best, values, scales = np.full(largest.shape, np.inf, np.float32), np.empty(blocks.shape, E2M1), np.empty(largest.shape, E4M3)
    for share in SHARES:
        tried = np.minimum(largest / (LARGEST * np.float32(share) * scale), LARGEST_SCALE).astype(E4M3)
        wide = (tried.astype(np.float32) * scale)[..., None]
        rounded = np.clip(np.divide(blocks, wide, out=np.zeros_like(blocks), where=wide > 0), -LARGEST, LARGEST).astype(E2M1)
        error = np.square(rounded.astype(np.float32) * wide - blocks).sum(-1)
        better = error < best
        best[better], values[better], scales[better] = error[better], rounded[better], tried[better]
    return values.reshape(rows.shape), scales


def widened_scale(inner: ir.Graph, before: ir.Node, steps: ir.Value, scale: np.ndarray, name: str, dtype: ir.DataType) -> ir.Value:
    """Scales of blocks in the activations' type: E4M3 in units of a tensor's fp32 scale."""
    label = f"{name}.tensor_scale"
    unit = initializer(inner, label, ir.DataType.FLOAT, (), ir.tensor(scale, name=label))
    wide = added(inner, before, "DequantizeLinear", [steps, unit], f"{name}.block_scale", steps.shape, ir.DataType.FLOAT)
    if dtype == ir.DataType.FLOAT:
        return wide
    return added(inner, before, "Cast", [wide], f"{name}.block_scale.narrow", steps.shape, dtype, to=int(dtype))


def rounded_input(inner: ir.Graph, product: ir.Node, scale: np.ndarray) -> ir.Value:
    """A product's input in blocks of 16 whose scales the engine finds, and wide again; products of one input share it."""
    x = product.inputs[0]
    for user in x.consumers():
        if user.domain == DOMAIN:
            return next(iter(user.outputs[0].consumers())).outputs[0]
    label = f"{x.name}.unit"
    unit = initializer(inner, label, ir.DataType.FLOAT, (), ir.tensor(scale, name=label))
    narrow = ir.Value(name=f"{x.name}.fp4", type=ir.TensorType(ir.DataType.FLOAT4E2M1), shape=x.shape)
    steps = ir.Value(name=f"{x.name}.steps", type=ir.TensorType(ir.DataType.FLOAT8E4M3FN))
    attributes = {"axis": -1, "block_size": BLOCK, "scale_type": int(ir.DataType.FLOAT8E4M3FN)}
    quantise = ir.node("TRT_FP4DynamicQuantize", [x, unit], attributes, domain=DOMAIN, outputs=[narrow, steps])
    inner.insert_before(product, quantise)
    dtype = x.dtype or ir.DataType.FLOAT
    wide = widened_scale(inner, product, steps, scale, str(x.name), dtype)
    return added(inner, product, "DequantizeLinear", [narrow, wide], f"{x.name}.rounded", x.shape, dtype, axis=-1, block_size=BLOCK)


SCHEMES: Schemes = {"tensorrt": (Nvfp4(),)}
