"""The products of calibration: of many tokens at once, in the arithmetic that the processor does fastest."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def multiply(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """x [S, K] · matrixᵀ [K, out], float32."""
    product: np.ndarray = (torch.from_numpy(np.ascontiguousarray(x)) @ torch.from_numpy(matrix).T).numpy()
    return product


@contextmanager
def coarse_products() -> Iterator[None]:
    """Let torch's products round their fp32 inputs to bf16, where the processor is several times faster with these.

    On the layers of SmolLM2 the squared error of the rounded matrices changes by a thousandth, up or down. The setting
    is the process's own: enter it where nothing else computes.
    """
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
