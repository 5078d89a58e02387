"""How many bytes the weights of a model take in a precision, and how many of them a token reads."""

from __future__ import annotations

from dataclasses import dataclass

from fusionroute.runtime.backends.ort_cpu import TARGET as CPU
from fusionroute.runtime.plan.shapes import Shape
from fusionroute.runtime.precisions import PRECISIONS

HALF = 16.0
VECTOR_BYTES = 4  # norms and biases are fp32
OF_FACTORS = 4  # and so are an expert's factors on a CPU; half of it elsewhere


@dataclass(frozen=True)
class Format:
    """Bits per weight, scales included: of matrices, of the head, and of the embedding's rows, which are looked up.

    `one_table`: whether a head that is the embedding is stored once with it.
    """

    body: float
    head: float
    embedding: float
    one_table: bool


# int8 in blocks of 64 with an fp32 scale. int4 in blocks of 64 with an fp16 scale and a zero point, or of 32 where it
# is looked up too; calibration keeps sensitive matrices at 8 bits, up to 5.0 on average: see docs/precision.md
ON_CPU = {"int8": Format(8.5, 8.5, 8.5, True), "int4": Format(4.9, 4.9, 4.9, True)}
# scales by row, or by block; a lookup of quantised rows is refused there: see docs/tensorrt.md
EIGHT = Format(8.1, 8.1, HALF, False)
IN_ENGINES = {"int8": EIGHT, "fp8": EIGHT, "int8-wo": EIGHT, "int4": Format(4.9, 4.9, HALF, False), "nvfp4": Format(4.5, 8.1, HALF, False)}

# bytes in memory for each stored one, once ONNX Runtime's kernels have packed them: measured on SmolLM2, x86 with VNNI
PACKED_ON_CPU = {"int8": 1.13, "int4": 1.39}


def packing(target: str, precision: str) -> float:
    """Bytes in memory for each byte of stored weights."""
    return PACKED_ON_CPU.get(precision, 1.0) if target == CPU else 1.0


def format_of(target: str, precision: str) -> Format:
    """What a precision is stored as on a target, and read as: on a CPU some are widened when loaded."""
    record = PRECISIONS[precision]
    table = ON_CPU if target == CPU else IN_ENGINES
    bits = float(record.rank(target))
    plain = Format(bits, bits, bits, True) if bits >= HALF else Format(bits * 1.06, bits * 1.06, HALF, False)
    return table.get(precision, plain)


@dataclass(frozen=True)
class Weights:
    """Bytes of one model: stored, and read for each token. values: that a token multiplies with."""

    resident: int
    read: int
    values: int


def weights_of(shape: Shape, fmt: Format) -> Weights:
    """Of a model with all of its weights. A token reads everything but the embedding's other rows."""
    vectors = VECTOR_BYTES * shape.vectors
    body, head, embedding = (
        int(values * bits / 8)
        for values, bits in zip((shape.body, shape.head, shape.head), (fmt.body, fmt.head, fmt.embedding), strict=True)
    )
    tables = head if shape.tied and fmt.one_table else head + embedding
    return Weights(body + tables + vectors, body + head + vectors, shape.body + shape.head)


def factors_of(shape: Shape, rank: int, target: str) -> Weights:
    """Of an expert that is a low-rank change of the base: factors of every matrix in the layers."""
    values = rank * shape.sides
    size = values * (OF_FACTORS if target == CPU else OF_FACTORS // 2) + VECTOR_BYTES * shape.vectors
    return Weights(size, size, values)
