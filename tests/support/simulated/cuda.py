"""The used part of `cuda.bindings.runtime`, on a simulated machine. Statuses are numbers, 0 is success, as there."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.support.simulated.machine import Machine, Mark, Range, Stream, Work
from tests.support.simulated.memory import POISON, Fault

RATE = 1e3  # bytes in one unit of the simulated time
ROOM = 64 << 20  # bytes of device memory


def locked(function: Callable[..., Any]) -> Callable[..., Any]:
    """One call at a time."""

    @functools.wraps(function)
    def call(self: Cuda, *arguments: Any) -> Any:
        with self.machine.lock:
            try:
                return function(self, *arguments)
            except Fault as fault:
                self.machine.faults.append(Fault(*fault.args))  # those raised while objects are freed reach nobody
                raise

    return call


class Cuda:
    """Stands in for the module."""

    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor", cudaDevAttrIntegrated="integrated"
    )
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="on")
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking, cudaEventDisableTiming, cudaHostAllocMapped = 1, 2, 2

    def __init__(self, machine: Machine):
        self.machine = machine
        self._handles = itertools.count(1)
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, Mark | None] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.launches = 0

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaGetDevice(self) -> tuple[int, int]:
        return 0, 0

    def cudaSetDevice(self, device: int) -> tuple[int]:
        return (0,)

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, 13000

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, f"simulated error {error}".encode()

    def cudaDeviceGetAttribute(self, kind: str, device: int) -> tuple[int, int]:
        machine = self.machine
        return 0, {"major": machine.sm // 10, "minor": machine.sm % 10, "integrated": int(machine.integrated)}[kind]

    # -- memory

    @locked
    def cudaMalloc(self, size: int) -> tuple[int, int]:
        return 0, self.machine.allocate(size, on_host=False).address

    @locked
    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, ROOM - self.machine.heap.used, ROOM

    @locked
    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        return 0, self.machine.allocate(size, on_host=True).address

    @locked
    def cudaHostGetDevicePointer(self, address: int, flags: int) -> tuple[int, int]:
        allocation, offset = self.machine.heap.find(address, 1, "cudaHostGetDevicePointer", by_device=False)
        return 0, allocation.mapped + offset

    @locked
    def cudaFree(self, address: int) -> tuple[int]:
        self._free(address)
        return (0,)

    cudaFreeHost = cudaFree

    def _free(self, address: int) -> None:
        machine = self.machine
        if machine.shared is not None and sum(a.address == address for a in machine.allocations) > 1:
            return  # two names for one piece of memory, in a mutation
        machine.heap.free(address, machine.clock)

    @locked
    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: str, stream: int) -> tuple[int]:
        machine, up, down = self.machine, kind == "up", kind == "down"
        name = {"up": "upload", "down": "download"}.get(kind, "copy")
        into, start = machine.heap.find(target, size, name, by_device=not down)
        out, begin = machine.heap.find(source, size, name, by_device=not up)

        def run() -> None:
            into.data[start : start + size] = out.data[begin : begin + size]
            into.valid[start : start + size] = out.valid[begin : begin + size]  # padding may travel with the rest

        work = Work(f"{name} of {out.name}", [Range(source, size, not up)], [Range(target, size, not down)], run, 1 + size / RATE)
        machine.submit(self.streams[stream], work)
        # it may come at any time from now on: what the host reads before it has waited is lost
        if down and not self._ran(work):
            into.data[start : start + size] = POISON
        return (0,)

    @locked
    def cudaMemcpy2DAsync(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: str, stream: int
    ) -> tuple[int]:  # fmt: skip
        """Between places on the device, which is all that the runtime asks for."""
        if kind != "on" or width > min(target_pitch, source_pitch):
            raise Fault("a copy of rows that overlap, or not within the device")
        pairs = [(target + row * target_pitch, source + row * source_pitch) for row in range(height)]
        places = [(self.machine.heap.find(a, width, "rows"), self.machine.heap.find(b, width, "rows")) for a, b in pairs]

        def run() -> None:
            for (into, start), (out, begin) in places:
                into.data[start : start + width] = out.data[begin : begin + width]

        work = Work(
            "copy of rows", [Range(b, width) for _, b in pairs], [Range(a, width) for a, _ in pairs], run, 1 + width * height / RATE
        )
        self.machine.submit(self.streams[stream], work)
        return (0,)

    def _ran(self, work: Work) -> bool:
        return not any(isinstance(e, Work) and e.run is work.run for s in self.machine.streams for e in s.queue)

    @locked
    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[int]:
        into, start = self.machine.heap.find(address, size, "memset")

        def run() -> None:
            into.data[start : start + size] = np.uint8(value)

        self.machine.submit(self.streams[stream], Work("memset", [], [Range(address, size)], run, 1 + size / RATE))
        return (0,)

    # -- streams and events

    @locked
    def cudaDeviceSynchronize(self) -> tuple[int]:
        for stream in list(self.streams.values()):
            self.machine.finish(self.machine.record(stream))
        return (0,)

    @locked
    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        handle = next(self._handles)
        self.streams[handle] = self.machine.stream()
        return 0, handle

    @locked
    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, int]:
        handle = next(self._handles)
        self.events[handle] = None
        return 0, handle

    @locked
    def cudaEventRecord(self, event: int, stream: int) -> tuple[int]:
        if not self.machine.skips("records"):
            self.events[event] = self.machine.record(self.streams[stream])
        return (0,)

    @locked
    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[int]:
        self.machine.wait(self.streams[stream], self.events[event])
        return (0,)

    @locked
    def cudaEventSynchronize(self, event: int) -> tuple[int]:
        self.machine.wait_on_host(self.events[event])
        return (0,)

    def cudaEventDestroy(self, event: int) -> tuple[int]:
        return (0,)

    cudaStreamDestroy = cudaGraphDestroy = cudaGraphExecDestroy = cudaEventDestroy

    # -- graphs

    @locked
    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self.streams[stream].captured = []
        return (0,)

    @locked
    def cudaStreamEndCapture(self, stream: int) -> tuple[int, list[Work]]:
        captured, self.streams[stream].captured = self.streams[stream].captured, None
        assert captured is not None
        return 0, captured

    @locked
    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[int, int]:
        handle = next(self._handles)
        self.graphs[handle] = graph
        return 0, handle

    @locked
    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        self.launches += 1
        for work in self.graphs[graph]:
            self.machine.submit(self.streams[stream], work)
        return (0,)


def host_bytes(address: int, size: int) -> bytes:
    """Host memory that TensorRT reads while it is called."""
    return ctypes.string_at(address, size)
