"""Kernels run where their machine code can be kept, and where it cannot."""

import numpy as np
import pytest
from numba import float32
from numba.core import caching

from fusionroute.calibration.compiled import compiled, read


@pytest.mark.parametrize("kept", [True, False])
def test_a_kernel_runs_where_nothing_can_be_written(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kept:
        monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])

    @compiled(read(float32, 1), float32, float32[::1])
    def multiply(values: np.ndarray, factor: float, products: np.ndarray) -> None:
        for at in range(len(values)):
            products[at] = values[at] * factor

    values = np.arange(5, dtype=np.float32)
    values.flags.writeable = False
    products = np.empty(5, np.float32)
    multiply(values, 3, products)
    assert products.tolist() == [0, 3, 6, 9, 12]
