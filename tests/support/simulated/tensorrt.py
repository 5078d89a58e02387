"""The used part of `tensorrt_rtx` (and `tensorrt`) on a simulated machine: engines run the ONNX graph they name."""

from __future__ import annotations

import hashlib
import json
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.support.simulated.cuda import Cuda, host_bytes
from tests.support.simulated.graphs import graph
from tests.support.simulated.machine import Machine, Range, Work
from tests.support.simulated.memory import POISON, Fault

VERSION = "1.7.1.116"
WEIGHTS = 20_000  # bytes of an engine's simulated weights
PASS = 50.0  # time of a model's forward pass; fusing takes a tenth
MAGIC = "simulated engine"


def plan(onnx_graph: Path) -> bytes:
    """What stands in for the bytes of an engine built from a graph."""
    return json.dumps({"kind": MAGIC, "graph": str(onnx_graph)}).encode()


def read_plan(content: bytes) -> Path | None:
    """The graph that such bytes name; None for others."""
    try:
        described = json.loads(content)
        return Path(described["graph"]) if described["kind"] == MAGIC else None
    except (ValueError, KeyError):
        return None


class Location(Enum):
    """TensorLocation."""

    DEVICE = 0
    HOST = 1


class ILogger:
    """A logger to derive from."""

    Severity = SimpleNamespace(ERROR="error", INTERNAL_ERROR="internal")


class TensorRt:
    """Stands in for the module."""

    __name__ = "tensorrt_rtx"
    __version__ = VERSION
    ILogger = ILogger
    TensorLocation = Location
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)

    def __init__(self, cuda: Cuda):
        self._cuda = cuda
        self.engines: list[Engine] = []

    def Runtime(self, logger: Any) -> TensorRt:
        """The module is its own runtime."""
        self._logger = logger
        return self

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        """An engine, or None with a reason in the log."""
        path = read_plan(content)
        if path is None:
            self._logger.log(ILogger.Severity.ERROR, "Serialization assertion magicTag failed.")
            return None
        engine = Engine(self._cuda, path, self._logger)
        self.engines.append(engine)
        return engine


class Engine:
    """An engine whose weights are bytes of device memory that must be there, whole, when it runs."""

    def __init__(self, cuda: Cuda, path: Path, logger: Any):
        self.cuda, self.machine, self.path, self.logger = cuda, cuda.machine, path, logger
        self.graph = graph(path)
        self.tensors = self.graph.inputs | self.graph.outputs
        self.num_io_tensors = len(self.tensors)
        self.device_memory_size_v2 = 1000 + 8 * len(path.name)
        digest = hashlib.sha256(str(path).encode()).digest()
        self.content = np.frombuffer(digest * (WEIGHTS // len(digest)), np.uint8)
        self.weights = self.machine.heap.allocate(f"weights of {path.stem}", len(self.content), on_host=False)
        self._fill()
        self.manager: WeightsManager | None = None
        loaded(self.machine, len(self.content))

    def _fill(self) -> None:
        self.weights.data[:] = self.content
        self.weights.valid[:] = True

    def get_tensor_name(self, number: int) -> Any:
        return list(self.tensors)[number]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][2]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.tensors[name][0])

    def get_tensor_location(self, name: str) -> Location:
        return Location.HOST if name == "k" else Location.DEVICE

    def create_execution_context(self, strategy: int) -> Context:
        return Context(self)

    def create_weights_manager(self) -> WeightsManager:
        self.manager = self.manager or WeightsManager(self)
        return self.manager


class Context:
    """An execution context; what it is at the call is what runs."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shapes = {name: shape for name, (_, _, shape) in engine.graph.inputs.items()}
        self.scratch = (0, 0)
        self.captured = False

    def _change(self) -> None:
        if self.captured:
            raise Fault(f"a context of {self.engine.path.stem} is changed after a graph was captured from it")

    def set_device_memory(self, address: int, size: int) -> None:
        self._change()
        if size < self.engine.device_memory_size_v2:
            raise Fault(f"the scratch memory of {self.engine.path.stem} is too small")
        self.scratch = address, size

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._change()
        if address % 256 and self.engine.get_tensor_location(name) is Location.DEVICE:
            raise Fault(f"{name} is not aligned")
        self.addresses[name] = address
        return name in self.engine.tensors or name in ("k",)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._change()
        allowed = self.engine.graph.inputs[name][2]
        self.shapes[name] = tuple(shape)
        return len(shape) == len(allowed) and all(a in (-1, b) for a, b in zip(allowed, shape, strict=True))

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def execute_async_v3(self, handle: int) -> bool:
        """Queue a run on what the context holds now; shape inputs on the host are read now."""
        engine, machine = self.engine, self.engine.machine
        with machine.lock:
            stream = engine.cuda.streams[handle]
            self.captured = self.captured or stream.captured is not None
            addresses, shapes = dict(self.addresses), dict(self.shapes)
            if missing := [name for name in engine.tensors if name not in addresses] or [n for n, s in shapes.items() if -1 in s]:
                engine.logger.log(ILogger.Severity.ERROR, f"{missing[0]} has no address or no shape")
                return False
            on_host: dict[str, np.ndarray] = {}
            reads = [Range(engine.weights.address, len(engine.content))]
            for name, (_, kind, _) in engine.graph.inputs.items():
                size = int(np.prod(shapes[name])) * np.dtype(kind).itemsize
                if engine.get_tensor_location(name) is Location.HOST:
                    on_host[name] = np.frombuffer(host_bytes(addresses[name], size), kind).reshape(shapes[name])
                else:
                    reads.append(Range(addresses[name], size))
                alias = name.replace("past.", "present.")
                if alias != name and alias in engine.tensors and addresses[alias] != addresses[name]:
                    raise Fault(f"{alias} is not at the address of {name}")
            scratch = Range(*self.scratch)

            def run() -> list[Range]:
                return execute(machine, engine, addresses, shapes, on_host, scratch)

            duration = PASS if "input_ids" in shapes else PASS / 10
            machine.submit(stream, Work(f"run of {engine.path.stem}", reads, [scratch], run, duration))
        return True


def execute(
    machine: Machine,
    engine: Engine,
    addresses: dict[str, int],
    shapes: dict[str, tuple[int, ...]],
    on_host: dict[str, np.ndarray],
    scratch: Range,
) -> list[Range]:
    """Run an engine's graph on the bytes at its addresses; returns the ranges written."""
    name = f"run of {engine.path.stem}"
    if (engine.weights.data != engine.content).any():
        raise Fault(f"{name} finds other weights than its own")
    feeds = dict(on_host)
    for tensor, (_, kind, _) in engine.graph.inputs.items():
        if tensor not in on_host:
            size = int(np.prod(shapes[tensor])) * np.dtype(kind).itemsize
            allocation, offset = machine.heap.find(addresses[tensor], size, name)
            if not allocation.valid[offset : offset + size].all():
                raise Fault(f"{name} reads bytes of {allocation.name} for {tensor} that nobody wrote")
            feeds[tensor] = allocation.data[offset : offset + size].copy().view(kind).reshape(shapes[tensor])
    memory, offset = machine.heap.find(scratch.address, scratch.size, name)
    memory.data[offset : offset + scratch.size] = POISON
    for prefix in [given.removesuffix("key_positions") for given in feeds if given.endswith("key_positions")]:
        if feeds[f"{prefix}write_index"][0] + feeds[f"{prefix}input_ids"].shape[1] > len(feeds[f"{prefix}key_positions"]):
            raise Fault(f"{name} reads fewer keys than the text has")
    try:
        outputs = engine.graph.run(feeds)
    except Exception as error:
        raise Fault(f"{name} fails on its inputs: {error}") from error
    written = []
    for tensor, array in outputs.items():
        raw = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        allocation, offset = machine.heap.find(addresses[tensor], len(raw), name)
        allocation.data[offset : offset + len(raw)] = raw
        written.append(Range(addresses[tensor], len(raw)))
    return written


def loaded(machine: Machine, size: int) -> None:
    """Note weights that come to the device."""
    machine.weights += size
    machine.most_weights = max(machine.most_weights, machine.weights)


class WeightsManager:
    """IWeightsManager: weights leave the device and come back to the same address."""

    def __init__(self, engine: Engine):
        self._engine, self._machine = engine, engine.machine

    def get_size(self) -> int:
        return len(self._engine.content)

    def save_to_buffer(self, target: int, size: int, location: Location, stream: int) -> bool:
        with self._machine.lock:
            self._engine.cuda.cudaMemcpyAsync(target, self._engine.weights.address, size, "down", stream)
        return location is Location.HOST

    def unload(self, stream: int) -> bool:
        """Waits for the stream, as the real one says it does; what runs on others is the caller's affair."""
        machine, weights = self._machine, self._engine.weights
        with machine.lock:
            machine.finish(machine.record(self._engine.cuda.streams[stream]))
            machine.heap.free(weights.address, machine.clock)
            machine.weights -= len(weights.data)
        return True

    def restore_from_buffer(self, source: int, size: int, location: Location, stream: int) -> bool:
        with self._machine.lock:
            self._machine.heap.remap(self._engine.weights)
            loaded(self._machine, size)
            self._engine.cuda.cudaMemcpyAsync(self._engine.weights.address, source, size, "up", stream)
        return location is Location.HOST
