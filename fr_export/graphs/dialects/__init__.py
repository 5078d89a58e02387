"""Dialects of ONNX: the operators that linear, norm and attention calls become for each kind of runtime. A new one is
one module.
"""

from fusionroute.fr_export.graphs.dialects import ort, pair, portable, tensorrt, tensorrt_10_3
from fusionroute.fr_export.graphs.dialects.dialect import Dialect

__all__ = ["Dialect", "ort", "pair", "portable", "tensorrt", "tensorrt_10_3"]
