"""Run FusionRoute bundles: per-token routing between expert LMs, logits fused with the router's.

Needs no torch, transformers or onnx.
"""

import os

# From 1.32 on ONNX Runtime writes a device id and events into the user's cache folder when it is imported, unless this
# is set before. A value that is set already, such as 0, stands.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from fusionroute.runtime.engine import FusionRuntime
from fusionroute.runtime.errors import BundleError, BusyError, ClosedError, FusionError, InputError, NumericalError, UnavailableError
from fusionroute.runtime.grammar import Grammar
from fusionroute.runtime.sampling import Sampling
from fusionroute.runtime.scoring import Scores
from fusionroute.runtime.session import Session
from fusionroute.runtime.stream import Result, Stream
from fusionroute.runtime.text import Token

__version__ = "0.1.0"  # the package's; pyproject.toml reads it here

__all__ = [
    "BundleError",
    "BusyError",
    "ClosedError",
    "FusionError",
    "FusionRuntime",
    "Grammar",
    "InputError",
    "NumericalError",
    "Result",
    "Sampling",
    "Scores",
    "Session",
    "Stream",
    "Token",
    "UnavailableError",
    "__version__",
]
