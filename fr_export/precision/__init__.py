"""The table of precisions and where each can be computed: a new one is one new file and one line here."""

from fr_export.precision.fp16 import Fp16
from fr_export.precision.fp32 import Fp32
from fr_export.precision.int8 import Int8
from fr_export.precision.scheme import Scheme

SCHEMES: dict[str, dict[str, Scheme]] = {"ort:cpu": {scheme.name: scheme for scheme in (Fp32(), Fp16(), Int8())}}

# precisions that a target cannot compute, with what to use instead
REFUSED = {
    (
        "ort:cpu",
        "bf16",
    ): "ONNX Runtime's CPU provider has no bf16 kernels: use fp32, or fp16, which computes in fp32 there and cannot overflow"
}

__all__ = ["REFUSED", "SCHEMES", "Scheme"]
