"""The table of precisions and where each can be computed: a new one is one new file and one line here."""

from fusionroute.fr_export.precision.fp32 import Fp32
from fusionroute.fr_export.precision.half import Half
from fusionroute.fr_export.precision.half_activations import Throughout
from fusionroute.fr_export.precision.int4 import Int4
from fusionroute.fr_export.precision.int8 import Int8
from fusionroute.fr_export.precision.qdq.int8_portable import SCHEMES as PORTABLE
from fusionroute.fr_export.precision.qdq import SCHEMES as TENSORRT
from fusionroute.fr_export.precision.qdq import SCHEMES_10_3 as TENSORRT_10_3
from fusionroute.fr_export.precision.scheme import Scheme
from fusionroute.fr_export.precision.w8a8 import Static

SCHEMES: dict[str, dict[str, Scheme]] = {
    "ort:cpu": {scheme.name: scheme for scheme in (Fp32(), Half("fp16"), Half("bf16"), Int8(), Int4(), Static())},
    "ort:cuda": {scheme.name: scheme for scheme in (Throughout("fp16"), Throughout("bf16"))},
    "portable": PORTABLE,
    "tensorrt": TENSORRT,
    "tensorrt:10.3": TENSORRT_10_3,
}

__all__ = ["SCHEMES", "Scheme"]
