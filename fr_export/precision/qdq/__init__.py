"""Precisions of the `tensorrt` target: everything in ONNX's own operators, with scales in the activations' type."""

from fusionroute.fr_export.precision.qdq.int4 import Int4
from fusionroute.fr_export.precision.qdq.int8 import Int8
from fusionroute.fr_export.precision.qdq.int8_wo import Int8WeightOnly
from fusionroute.fr_export.precision.qdq.plain import Plain
from fusionroute.fr_export.precision.scheme import Scheme

ALL: tuple[Scheme, ...] = (Plain("fp32"), Plain("fp16"), Plain("bf16"), Int8(), Int8WeightOnly(), Int4())
SCHEMES = {scheme.name: scheme for scheme in ALL}
# blocks of int4 are ONNX 21's, and TensorRT 10.3 is only said to read up to 20
SCHEMES_10_3 = {name: scheme for name, scheme in SCHEMES.items() if name != "int4"}

__all__ = ["SCHEMES", "SCHEMES_10_3"]
