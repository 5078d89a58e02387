"""Small inputs: packed, aligned, bound where the session reads them, and sent in one piece."""

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.runtime.backends.device_buffers import ALIGNMENT, Inputs, Place

DTYPES = (np.int64, np.int32, np.float32)
LAYOUTS = st.lists(st.tuples(st.lists(st.integers(1, 5), max_size=3), st.sampled_from(DTYPES), st.booleans()), min_size=1, max_size=6)


class Binding:
    """What was bound: name → (device, shape, address)."""

    def __init__(self) -> None:
        self.bound: dict[str, tuple[str, tuple[int, ...], int]] = {}

    def bind_input(self, name: str, device: str, number: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        self.bound[name] = device, shape, address


class Values:
    """OrtValues of a device, which are the host's."""

    @staticmethod
    def ortvalue_from_shape_and_type(shape: tuple[int, ...], dtype: Any, memory: str, number: int) -> Any:
        assert memory == "cuda"
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cpu", 0)


def place(on_host: dict[str, bool]) -> Place:
    """A CUDA session's place; where its inputs lie is what ONNX Runtime says of them."""
    session = SimpleNamespace(
        get_inputs=lambda: [SimpleNamespace(name=name) for name in on_host],
        get_input_memory_infos=lambda: [SimpleNamespace(name="Cpu" if host else "Cuda") for host in on_host.values()],
    )
    return Place(SimpleNamespace(OrtValue=Values), session, "cuda")


@given(LAYOUTS)
def test_what_is_sent_is_what_stands_at_the_bound_addresses(drawn: list[tuple[list[int], Any, bool]]) -> None:
    layout = {f"input{number}": (tuple(shape), dtype) for number, (shape, dtype, _) in enumerate(drawn)}
    where = place({f"input{number}": host for number, (_, _, host) in enumerate(drawn)})
    inputs, binding = Inputs(where, layout), Binding()
    inputs.bind(binding)
    random = np.random.default_rng(0)
    for _ in range(2):
        sent = {name: random.integers(0, 99, shape).astype(dtype) for name, (shape, dtype) in layout.items()}
        for name, array in sent.items():
            inputs.arrays[name][...] = array
        inputs.send()
        for name, (device, shape, address) in binding.bound.items():
            assert (device, shape) == ("cuda" if where.holds(name) else "cpu", layout[name][0])
            assert address % ALIGNMENT == 0 if device == "cuda" else address == inputs.arrays[name].ctypes.data
            assert ctypes.string_at(address, sent[name].nbytes) == sent[name].tobytes()


def test_what_the_host_writes_reaches_the_device_with_send_only() -> None:
    inputs, binding = Inputs(place({"ids": False}), {"ids": ((4,), np.int64)}), Binding()
    inputs.bind(binding)
    inputs.arrays["ids"][:] = 7
    address = binding.bound["ids"][2]
    assert list((ctypes.c_int64 * 4).from_address(address)) == [0] * 4
    inputs.send()
    assert list((ctypes.c_int64 * 4).from_address(address)) == [7] * 4
    inputs.bind(binding, "ids", (2,))
    assert binding.bound["ids"] == ("cuda", (2,), address)
