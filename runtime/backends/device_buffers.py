"""Memory that ONNX Runtime binds by address: buffers on the device, and small inputs that travel to it in one piece.

When an input is bound in another memory than the session reads, ONNX Runtime copies it once, at binding
(IOBinding::BindInput in core/session/IOBinding.cc), and later changes are lost. So every input is bound where the
session reads it, and inputs on the device are updated in place. `update_inplace` returns when the bytes have arrived
(cudaMemcpy_HostToDevice in core/providers/cuda/cuda_provider_factory.cc).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

ALIGNMENT = 256  # bytes: TensorRT takes only addresses that are multiples of it
HOST = "Cpu"  # ONNX Runtime's name of the host's allocator

Layout = Mapping[str, tuple[tuple[int, ...], Any]]  # name → shape, numpy dtype


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Place:
    """A session's device: the first one of the kind that `memory` names, such as `cuda`."""

    def __init__(self, onnxruntime: Any, session: Any, memory: str):
        self._values = onnxruntime.OrtValue
        self.memory = memory
        infos = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
        self._on_device = {value.name: memory == "cpu" or info.name != HOST for value, info in infos}

    def holds(self, name: str) -> bool:
        """Whether the session reads an input on the device; else it reads it on the host."""
        return self._on_device[name]

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An OrtValue on the device, not initialised."""
        return self._values.ortvalue_from_shape_and_type(shape, dtype, self.memory, 0)

    def zeros(self, size: int) -> Any:
        """`size` bytes on the device, all zero, at an aligned address within `buffer` (see `start`)."""
        value = self.buffer((size + ALIGNMENT,), np.uint8)
        value.update_inplace(np.zeros(size + ALIGNMENT, np.uint8))
        return value


def start(value: Any) -> int:
    """The first aligned address of an OrtValue; `Place.zeros` makes it ALIGNMENT bytes larger than needed."""
    return aligned(int(value.data_ptr()))


class Inputs:
    """Small inputs of fixed shapes, sent to the device in one copy. The host writes `arrays`, then calls `send`."""

    def __init__(self, place: Place, layout: Layout):
        self._place, self._layout = place, layout
        offsets, size = {}, 0
        for name, (shape, dtype) in layout.items():
            if place.holds(name):
                offsets[name] = size
                size += aligned(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        self._value = place.zeros(size)
        first = start(self._value)
        shift = first - int(self._value.data_ptr())
        self._staged = np.zeros(size + ALIGNMENT, np.uint8)
        self.arrays: dict[str, np.ndarray] = {}
        self._addresses: dict[str, int] = {}
        for name, (shape, dtype) in layout.items():
            if name in offsets:
                begin = shift + offsets[name]
                bytes_ = int(np.prod(shape)) * np.dtype(dtype).itemsize
                self.arrays[name] = self._staged[begin : begin + bytes_].view(dtype).reshape(shape)
                self._addresses[name] = first + offsets[name]
            else:
                self.arrays[name] = np.zeros(shape, dtype)
                self._addresses[name] = self.arrays[name].ctypes.data

    def bind(self, binding: Any, name: str | None = None, shape: tuple[int, ...] | None = None) -> None:
        """Bind all inputs, or one of them with a smaller shape."""
        for each in self._layout if name is None else (name,):
            full, dtype = self._layout[each]
            memory = self._place.memory if self._place.holds(each) else "cpu"
            binding.bind_input(each, memory, 0, dtype, full if shape is None else shape, self._addresses[each])

    def send(self) -> None:
        """Copy what the host wrote to the device, for the next run."""
        self._value.update_inplace(self._staged)


class Rows:
    """Logits that stay on the device, float32 [1, V]: reading them copies them. `number`: of the row in `value`."""

    def __init__(self, value: Any, memory: str, number: int = 0):
        self._value, self.memory, self._number = value, memory, number
        self.address = int(value.data_ptr()) + number * value.shape()[1] * np.dtype(np.float32).itemsize

    def __len__(self) -> int:
        return 1

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._value.numpy()[self._number : self._number + 1], dtype)

    def __getitem__(self, key: Any) -> Any:
        return self.__array__()[key]
