"""Run FusionRoute bundles: per-token routing between expert LMs, logits fused with the router's. Needs no torch, transformers or onnx."""

from runtime.engine import FusionRuntime
from runtime.errors import BundleError, ClosedError, FusionError, InputError, UnavailableError
from runtime.sampling import Sampling
from runtime.scoring import Scores
from runtime.session import Session
from runtime.stream import Result, Stream
from runtime.text import Token

__all__ = [
    "BundleError",
    "ClosedError",
    "FusionError",
    "FusionRuntime",
    "InputError",
    "Result",
    "Sampling",
    "Scores",
    "Session",
    "Stream",
    "Token",
    "UnavailableError",
]
