"""Dialects of ONNX: what a traced model's linear, norm and attention calls become for each kind of runtime. A new one is one module."""

from fusionroute.fr_export.graphs.dialects import ort, portable, tensorrt, tensorrt_10_3
from fusionroute.fr_export.graphs.dialects.dialect import Dialect

__all__ = ["Dialect", "ort", "portable", "tensorrt", "tensorrt_10_3"]
