"""The layer over CUDA: memory, copies, streams, events, graphs, and what the binding makes of CUDA's statuses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.tensorrt.device import Device, Memory
from fusionroute.runtime.tensorrt.library import device_sm
from fusionroute.runtime.tensorrt.transfers import host_array

Bytes = npt.NDArray[np.uint8]


def bytes_of(memory: Memory) -> Bytes:
    content: Bytes = host_array(memory.address, (memory.size,), np.uint8)
    return content


def random_bytes(size: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@pytest.fixture
def on_device(device: Device) -> Callable[[Bytes], Memory]:
    """Copies bytes to new device memory, and waits."""

    def send(content: Bytes) -> Memory:
        memory, source, stream = device.memory(content.size), device.pinned(content.size), device.stream()
        source.write(0, content)
        stream.upload(memory.address, source.address, content.size)
        device.finish()
        return memory

    return send


@pytest.fixture
def on_host_again(device: Device) -> Callable[[Memory], Bytes]:
    """The bytes of device memory, once all work is done."""

    def fetch(memory: Memory) -> Bytes:
        target, stream = device.pinned(memory.size), device.stream()
        device.finish()
        stream.download(target.address, memory.address, memory.size)
        device.finish()
        content: Bytes = bytes_of(target).copy()
        return content

    return fetch


def test_the_driver_says_the_same_of_the_device(device: Device) -> None:
    assert device.sm == device_sm() and device.sm >= 50 and device.index == 0


@pytest.mark.parametrize("size", [1, 255, 256, 257, 100_003, 8 << 20])
def test_what_goes_up_comes_down(device: Device, size: int) -> None:
    stream, event = device.stream(), device.event()
    sent, received, memory = device.pinned(size), device.pinned(size), device.memory(size)
    content = random_bytes(size)
    sent.write(0, content)
    stream.upload(memory.address, sent.address, size)
    stream.download(received.address, memory.address, size)
    stream.record(event)
    event.wait()
    assert np.array_equal(bytes_of(received), content)


@pytest.mark.parametrize(
    ("width", "count", "target_pitch", "source_pitch"), [(1, 1, 1, 1), (64, 5, 64, 128), (48, 7, 96, 48), (33, 3, 40, 37)]
)
def test_rows_land_where_their_pitch_says(
    device: Device, on_device: Any, on_host_again: Any, width: int, count: int, target_pitch: int, source_pitch: int
) -> None:
    before, content = random_bytes(target_pitch * count, 1), random_bytes(source_pitch * count, 2)
    target, source, stream = on_device(before), on_device(content), device.stream()
    stream.copy_rows(target.address, target_pitch, source.address, source_pitch, width, count)
    expected = before.reshape(count, target_pitch).copy()
    expected[:, :width] = content.reshape(count, source_pitch)[:, :width]
    assert np.array_equal(on_host_again(target), expected.ravel())


def test_zeros_and_copies_within_the_device(device: Device, on_device: Any, on_host_again: Any) -> None:
    content = random_bytes(1000)
    source, target, stream = on_device(content), device.memory(1000), device.stream()
    stream.zero(target)
    stream.copy(target.address + 100, source.address + 200, 300)
    expected = np.zeros(1000, np.uint8)
    expected[100:400] = content[200:500]
    assert np.array_equal(on_host_again(target), expected)


def test_events_order_streams(device: Device) -> None:
    """A hundred values through one buffer, written by one stream and read by another, 2 MB each."""
    count = 1 << 18
    writer, reader, written, read = device.stream(), device.stream(), device.event(), device.event()
    buffer, sources, targets = (
        device.memory(8 * count), [device.pinned(8 * count) for _ in range(4)], [device.pinned(8 * count) for _ in range(4)],
    )  # fmt: skip
    for value in range(100):
        place = value % 4
        if value >= 4:
            read.wait()
            first, last = host_array(targets[place].address, (count,), np.int64)[[0, -1]]
            assert first == last == value - 4
        host_array(sources[place].address, (count,), np.int64)[:] = value
        writer.wait(read)  # of the value before
        writer.upload(buffer.address, sources[place].address, 8 * count)
        writer.record(written)
        reader.wait(written)
        reader.download(targets[place].address, buffer.address, 8 * count)
        reader.record(read)
    device.finish()


def test_an_event_that_was_never_recorded_is_reached(device: Device) -> None:
    device.event().wait()
    stream = device.stream()
    stream.wait(device.event())
    device.finish()


def test_an_event_that_the_collector_ended_first_waits_for_all_work(device: Device, on_device: Any) -> None:
    """Of a circle that is collected, an event may be ended before the cache that waits for it."""
    content, stream, event, received = random_bytes(64), device.stream(), device.event(), device.pinned(64)
    source = on_device(content)
    stream.download(received.address, source.address, 64)
    stream.record(event)
    event.__del__()
    event.wait()
    assert np.array_equal(bytes_of(received), content)


def test_pinned_memory_under_the_device_s_address(device: Device, on_device: Any) -> None:
    content, stream, event = random_bytes(512), device.stream(), device.event()
    source, mapped = on_device(content), device.pinned(512)
    stream.copy(device.mapped(mapped), source.address, 512)
    stream.record(event)
    event.wait()
    assert np.array_equal(bytes_of(mapped), content)


def test_captured_work_runs_when_it_is_launched_and_only_then(device: Device) -> None:
    stream, event, memory = device.stream(), device.event(), device.memory(8)
    sent, received = device.pinned(8), device.pinned(8)
    value, result = (host_array(each.address, (1,), np.int64) for each in (sent, received))
    result[0] = -5

    def work() -> None:
        stream.upload(memory.address, sent.address, 8)
        stream.download(received.address, memory.address, 8)

    graph = stream.capture(work)
    device.finish()
    assert result[0] == -5
    for number in range(3):
        value[0] = number
        stream.launch(graph)
        stream.record(event)
        event.wait()
        assert result[0] == number


def test_what_cannot_be_captured_leaves_a_usable_stream(device: Device) -> None:
    stream, memory, received, event = device.stream(), device.memory(8), device.pinned(8), device.event()
    with pytest.raises(FusionError, match="CUDA failed in cudaStreamEndCapture: ") as caught:
        stream.capture(lambda: device.finish())
    assert "CUDA failed in cudaDeviceSynchronize: operation not permitted when stream is capturing" in str(caught.value.__context__)
    stream.zero(memory)
    stream.download(received.address, memory.address, 8)
    stream.record(event)
    event.wait()
    assert not bytes_of(received).any()


def test_memory_that_nobody_has_is_refused_and_no_more(device: Device) -> None:
    free = device.free_memory()
    for _ in range(3):
        with pytest.raises(FusionError, match=r"^CUDA failed in cudaMalloc: out of memory; load the bundle again\.$"):
            device.memory(1 << 50)
    memory = device.memory(32 << 20)
    assert device.free_memory() <= free - (32 << 20)
    memory.free()
    memory.free()
    assert device.free_memory() >= free - (2 << 20)


def test_the_binding_s_status_names_what_failed(device: Device) -> None:
    with pytest.raises(FusionError, match=r"^CUDA failed in cudaHostGetDevicePointer: invalid argument; load"):
        device.call("cudaHostGetDevicePointer", np.zeros(1).ctypes.data, 1)
    with pytest.raises(FusionError, match=r"^CUDA failed in cudaSetDevice: invalid device ordinal; load"):
        device.call("cudaSetDevice", 99)


def test_copies_between_peers(device: Device, on_device: Any) -> None:
    """Between two devices where there are two; else from the device to itself."""
    content, stream, event = random_bytes(4096), device.stream(), device.event()
    source, received = on_device(content), device.pinned(4096)
    peer = min(1, device.call("cudaGetDeviceCount") - 1)
    device.call("cudaSetDevice", peer)
    other = device.memory(4096)
    device.enter()
    device.call("cudaMemcpyPeerAsync", other.address, peer, source.address, device.index, 4096, stream.handle)
    device.call("cudaMemcpyPeerAsync", source.address, device.index, other.address, peer, 4096, stream.handle)
    stream.download(received.address, source.address, 4096)
    stream.record(event)
    event.wait()
    assert np.array_equal(bytes_of(received), content)
