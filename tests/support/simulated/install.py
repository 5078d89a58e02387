"""Put a simulated machine in the place of the CUDA and TensorRT modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tests.support.simulated.cuda import Cuda
from tests.support.simulated.machine import Machine
from tests.support.simulated.tensorrt import TensorRt


@contextmanager
def simulated(machine: Machine) -> Iterator[Cuda]:
    """Inside, the runtime finds this machine when it imports cuda-bindings, TensorRT or TensorRT-RTX."""
    cuda = Cuda(machine)
    library = TensorRt(cuda)
    modules: dict[str, Any] = {"cuda.bindings.runtime": cuda, "tensorrt_rtx": library, "tensorrt": library}
    with patch.dict(sys.modules, modules):
        yield cuda
