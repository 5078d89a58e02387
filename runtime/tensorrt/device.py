"""A thin layer over `cuda.bindings.runtime` that checks every status: streams, events, memory, copies, graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib import import_module
from typing import Any

from fusionroute.runtime.errors import FusionError, UnavailableError, one_line

ALIGNMENT = 256  # bytes: what TensorRT asks of the addresses that it is given


class Device:
    """The current CUDA device. Raises UnavailableError where the package, the driver or the device is missing."""

    def __init__(self) -> None:
        try:
            self._api: Any = import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise UnavailableError("The TensorRT backend needs cuda-bindings: pip install cuda-bindings.") from error
        status, *results = self._api.cudaGetDeviceCount()
        if int(status) or not results[0]:
            raise UnavailableError(f"No CUDA device answers here ({self._reason(status)}): use device='cpu', or mend the driver.")
        kinds = self._api.cudaDeviceAttr
        self.index: int = self.call("cudaGetDevice")
        self.sm: int = 10 * self._attribute(kinds.cudaDevAttrComputeCapabilityMajor) + self._attribute(
            kinds.cudaDevAttrComputeCapabilityMinor
        )
        # host and device share their memory (Jetson)
        self.integrated = bool(self._attribute(kinds.cudaDevAttrIntegrated))
        self._to_device = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._on_device = self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._to_host = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost

    def call(self, name: str, *arguments: Any) -> Any:
        """One function of the CUDA runtime; its result, if it has one. Raises FusionError with CUDA's own words."""
        error, *results = getattr(self._api, name)(*arguments)
        if int(error):
            raise FusionError(f"CUDA failed in {name}: {self._reason(error)}; load the bundle again.")
        return results[0] if results else None

    def _reason(self, error: Any) -> str:
        return str(self._api.cudaGetErrorString(error)[1].decode())

    def _attribute(self, kind: Any) -> int:
        return int(self.call("cudaDeviceGetAttribute", kind, self.index))

    def enter(self) -> None:
        """Make the device current in this thread: CUDA keeps that per thread."""
        self.call("cudaSetDevice", self.index)

    def free_memory(self) -> int:
        """Bytes of the device's memory that nobody has taken."""
        return int(self.call("cudaMemGetInfo"))

    def finish(self) -> None:
        """Block the calling thread until all that was queued on the device is done."""
        self.call("cudaDeviceSynchronize")

    def stream(self) -> Stream:
        """A new stream that does not wait for the default stream."""
        return Stream(self, self.call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking))

    def event(self) -> Event:
        """A new event, which counts as reached until it is first recorded."""
        return Event(self, self.call("cudaEventCreateWithFlags", self._api.cudaEventDisableTiming))

    def memory(self, size: int) -> Memory:
        """Device memory of `size` bytes, not initialised."""
        address = self.call("cudaMalloc", max(size, 1))
        return Memory(int(address), size, lambda: self.call("cudaFree", address))

    def pinned(self, size: int) -> Memory:
        """Page-locked host memory, which devices may also address (see `mapped`)."""
        address = self.call("cudaHostAlloc", max(size, 1), self._api.cudaHostAllocMapped)
        return Memory(int(address), size, lambda: self.call("cudaFreeHost", address))

    def mapped(self, memory: Memory) -> int:
        """The address by which the device reads and writes pinned memory."""
        return int(self.call("cudaHostGetDevicePointer", memory.address, 0))


class Memory:
    """An owned range of bytes, freed once: by `free`, or when nothing refers to it any more."""

    def __init__(self, address: int, size: int, release: Callable[[], None]):
        self.address, self.size = address, size
        self._release: Callable[[], None] | None = release

    def write(self, offset: int, array: Any) -> None:
        """Copy a contiguous numpy array into host memory, at an offset in bytes."""
        ctypes.memmove(self.address + offset, array.ctypes.data, array.nbytes)

    def free(self) -> None:
        """Give the memory back; again is harmless."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __del__(self) -> None:
        try:
            self.free()
        except Exception:  # the interpreter or the driver is shutting down
            self._release = None


class Event:
    """A point in a stream's work that others can wait for."""

    def __init__(self, device: Device, handle: Any):
        self.handle = handle
        self._device = device

    def wait(self) -> None:
        """Block the calling thread until the work recorded is done."""
        if self.handle is None:  # the collector has ended it before those who wait for it
            self._device.finish()
        else:
            self._device.call("cudaEventSynchronize", self.handle)

    def __del__(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            destroy(self._device, "cudaEventDestroy", handle)


class Stream:
    """A queue of work that the device does in order."""

    def __init__(self, device: Device, handle: Any):
        self.handle = handle
        self._device = device

    def __int__(self) -> int:
        return int(self.handle)

    def wait(self, event: Event) -> None:
        """Later work of this stream waits for what was recorded in an event, the host does not."""
        self._device.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def record(self, event: Event) -> None:
        """The event is reached when the work queued so far is done."""
        self._device.call("cudaEventRecord", event.handle, self.handle)

    def upload(self, target: int, source: int, size: int) -> None:
        """Copy bytes from pinned host memory to the device."""
        self._device.call("cudaMemcpyAsync", target, source, size, self._device._to_device, self.handle)

    def download(self, target: int, source: int, size: int) -> None:
        """Copy bytes from the device to pinned host memory."""
        self._device.call("cudaMemcpyAsync", target, source, size, self._device._to_host, self.handle)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, count: int) -> None:
        """Copy `count` rows of `width` bytes within the device, whose beginnings are a pitch apart."""
        self._device.call(
            "cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, count, self._device._on_device, self.handle
        )  # fmt: skip

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes within the device's memory."""
        self._device.call("cudaMemcpyAsync", target, source, size, self._device._on_device, self.handle)

    def zero(self, memory: Memory) -> None:
        """Fill device memory with zeros."""
        self._device.call("cudaMemsetAsync", memory.address, 0, memory.size, self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` queues on this stream, without running it. Nothing else may use the stream meanwhile."""
        call, api = self._device.call, self._device._api
        call("cudaStreamBeginCapture", self.handle, api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        finally:
            graph = call("cudaStreamEndCapture", self.handle)
        try:
            return Graph(self._device, call("cudaGraphInstantiate", graph, 0))
        finally:
            call("cudaGraphDestroy", graph)

    def launch(self, graph: Graph) -> None:
        """Queue a captured graph."""
        self._device.call("cudaGraphLaunch", graph.handle, self.handle)

    def __del__(self) -> None:
        destroy(self._device, "cudaStreamDestroy", self.handle)


class Graph:
    """Captured work, ready to be launched again and again at the same addresses."""

    def __init__(self, device: Device, handle: Any):
        self.handle = handle
        self._device = device

    def __del__(self) -> None:
        destroy(self._device, "cudaGraphExecDestroy", self.handle)


def destroy(device: Device, function: str, handle: Any) -> None:
    """Release a handle whose owner is gone; what fails here fails because the process ends."""
    try:
        device.call(function, handle)
    except Exception as error:
        one_line(error)


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT
