"""Precisions of the `tensorrt` target: everything in ONNX's own operators, with scales in the activations' type."""

from fr_export.precision.scheme import Scheme
from fr_export.precision.trt.plain import Plain

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (Plain("fp32"), Plain("fp16"), Plain("bf16"))}

__all__ = ["SCHEMES"]
