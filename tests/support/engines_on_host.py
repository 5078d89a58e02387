"""A stand-in for TensorRT on any CUDA: engines copy their inputs to the host and run the ONNX graph that they name there.

An execution is copies, one function of the host, and copies, all queued on the given stream: as asynchronous as an
engine, and capturable. So the order of streams is tried on a real device where TensorRT is not installed, and its
results must be those of the same graphs run one after another. `tests.support.simulated` looks closer, on no device.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from fusionroute.runtime.tensorrt.device import Device, Memory
from fusionroute.runtime.tensorrt.transfers import host_array
from tests.support.simulated.graphs import graph
from tests.support.simulated.tensorrt import VERSION, WEIGHTS, ILogger, Location, TensorRt, read_plan

Shapes = dict[str, tuple[int, ...]]
HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
ANYWHERE = 4  # cudaMemcpyDefault: the addresses say whether they are the device's
POISON = 0xFF


class Library:
    """Stands in for the module `tensorrt_rtx`. `faults`: what went wrong in functions of the host, which cannot raise."""

    __name__ = "tensorrt_rtx"
    __version__ = VERSION
    ILogger = ILogger
    TensorLocation = Location
    ExecutionContextAllocationStrategy = TensorRt.ExecutionContextAllocationStrategy

    def __init__(self) -> None:
        self.device = Device()
        self.faults: list[str] = []
        self.functions: list[Any] = []  # kept as long as the library: queued work may outlive its context

    def Runtime(self, logger: Any) -> Library:
        """The module is its own runtime."""
        self.logger = logger
        return self

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        """An engine, or None with a reason in the log."""
        path = read_plan(content)
        if path is None:
            self.logger.log(ILogger.Severity.ERROR, "Serialization assertion magicTag failed.")
            return None
        return Engine(self, path)


class Engine:
    """An engine whose weights are bytes of device memory that must be there when it runs."""

    device_memory_size_v2 = 4096

    def __init__(self, library: Library, path: Path):
        self.library, self.path, self.graph = library, path, graph(path)
        self.tensors = self.graph.inputs | self.graph.outputs
        self.num_io_tensors = len(self.tensors)
        self.content = np.random.default_rng(len(path.name)).integers(0, 255, WEIGHTS, np.uint8)
        device = library.device
        self.weights, stream, source = device.memory(WEIGHTS), device.stream(), device.pinned(WEIGHTS)
        source.write(0, self.content)
        stream.upload(self.weights.address, source.address, WEIGHTS)
        device.finish()

    def get_tensor_name(self, number: int) -> str:
        name: str = list(self.tensors)[number]
        return name

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][2]

    def get_tensor_dtype(self, name: str) -> Any:
        return type("Kind", (), {"name": self.tensors[name][0]})

    def get_tensor_location(self, name: str) -> Location:
        return Location.HOST if name == "k" else Location.DEVICE

    def create_execution_context(self, strategy: int) -> Context:
        return Context(self)

    def create_weights_manager(self) -> WeightsManager:
        return WeightsManager(self)


class Context:
    """An execution context. What its executions stage is kept as long as it, since captured graphs use it again."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._shapes: Shapes = {name: shape for name, (_, _, shape) in engine.graph.inputs.items()}
        self._staged: dict[tuple[str, tuple[int, ...]], Memory] = {}

    def set_device_memory(self, address: int, size: int) -> None:
        self._scratch = address, size

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._engine.tensors

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        """Queue a run on what the context holds now; shape inputs on the host are read now."""
        engine, call = self._engine, self._engine.library.device.call
        fixed, feeds = {}, {}
        for name, (_, kind, _) in engine.graph.inputs.items():
            shape = self._shapes[name]
            if engine.get_tensor_location(name) is Location.HOST:
                fixed[name] = host_array(self._addresses[name], shape, kind).copy()
            else:
                feeds[name] = self._stage(name, shape, kind)
                call("cudaMemcpyAsync", feeds[name].ctypes.data, self._addresses[name], feeds[name].nbytes, ANYWHERE, stream)
        weights = self._stage("weights", engine.content.shape, np.uint8)
        call("cudaMemcpyAsync", weights.ctypes.data, engine.weights.address, WEIGHTS, ANYWHERE, stream)
        # on nothing, for the shapes
        empty = engine.graph.run(fixed | {name: np.zeros_like(array) for name, array in feeds.items()})
        outputs = {name: self._stage(name, array.shape, array.dtype) for name, array in empty.items()}
        engine.library.device.call("cudaMemsetAsync", self._scratch[0], POISON, engine.device_memory_size_v2, stream)

        def run(_: Any) -> None:
            try:
                assert (weights == engine.content).all(), "other weights than its own"
                for name, array in engine.graph.run(fixed | feeds).items():
                    outputs[name][...] = array
            except Exception as error:
                engine.library.faults.append(f"{engine.path.stem}: {error}")

        function = HostFunction(run)
        engine.library.functions.append(function)
        call("cudaLaunchHostFunc", stream, ctypes.cast(function, ctypes.c_void_p).value, 0)
        for name, array in outputs.items():
            call("cudaMemcpyAsync", self._addresses[name], array.ctypes.data, array.nbytes, ANYWHERE, stream)
        return True

    def _stage(self, name: str, shape: tuple[int, ...], kind: Any) -> Any:
        """Pinned memory for a tensor; one stream runs a context, so that executions use it in turn."""
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        if (name, shape) not in self._staged:
            self._staged[name, shape] = self._engine.library.device.pinned(size)
        return host_array(self._staged[name, shape].address, shape, kind)


class WeightsManager:
    """IWeightsManager: weights leave the device, here by being overwritten, and come back to the same address."""

    def __init__(self, engine: Engine):
        self._engine, self._call = engine, engine.library.device.call

    def get_size(self) -> int:
        return WEIGHTS

    def save_to_buffer(self, target: int, size: int, location: Location, stream: int) -> bool:
        self._call("cudaMemcpyAsync", target, self._engine.weights.address, size, ANYWHERE, stream)
        return True

    def unload(self, stream: int) -> bool:
        self._call("cudaStreamSynchronize", stream)
        self._call("cudaMemsetAsync", self._engine.weights.address, POISON, WEIGHTS, stream)
        return True

    def restore_from_buffer(self, source: int, size: int, location: Location, stream: int) -> bool:
        self._call("cudaMemcpyAsync", self._engine.weights.address, source, size, ANYWHERE, stream)
        return True


@contextmanager
def engines_on_host() -> Iterator[Library]:
    """Inside, the runtime finds this library when it imports TensorRT or TensorRT-RTX.

    Garbage is not collected there: a collection within a function of the host might call CUDA, which CUDA forbids.
    """
    library = Library()
    gc.collect()
    gc.disable()
    try:
        modules: dict[str, Any] = {"tensorrt_rtx": library, "tensorrt": library}
        with patch.dict(sys.modules, modules):
            yield library
    finally:
        library.device.finish()
        gc.enable()
