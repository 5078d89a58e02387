"""The simulated machine finds what it is there to find, and lets pass what is right."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest

from fusionroute.runtime.tensorrt.transfers import host_array
from tests.support.simulated import tensorrt as simulated_tensorrt
from tests.support.simulated.cuda import Cuda
from tests.support.simulated.graphs import TYPES
from tests.support.simulated.machine import POLICIES, Machine
from tests.support.simulated.memory import Fault

POLICY = pytest.mark.parametrize("policy", POLICIES)


class Bench:
    """Two streams, an event, a device buffer and two pinned ones of 8 bytes."""

    def __init__(self, policy: str):
        self.machine = Machine(0, policy)
        self.cuda = Cuda(self.machine)
        self.a, self.b = (self.cuda.cudaStreamCreateWithFlags(1)[1] for _ in range(2))
        self.event = self.cuda.cudaEventCreateWithFlags(2)[1]
        self.buffer = self.cuda.cudaMalloc(8)[1]
        self.sent, self.got = (self.cuda.cudaHostAlloc(8, 2)[1] for _ in range(2))

    def host(self, address: int) -> np.ndarray:
        return host_array(address, (1,), np.int64)

    def up(self, stream: int) -> None:
        self.cuda.cudaMemcpyAsync(self.buffer, self.sent, 8, "up", stream)

    def down(self, stream: int) -> None:
        self.cuda.cudaMemcpyAsync(self.got, self.buffer, 8, "down", stream)


@POLICY
def test_what_events_order_is_right(policy: str) -> None:
    bench = Bench(policy)
    for value in range(5):
        bench.host(bench.sent)[0] = value
        bench.up(bench.a)
        bench.cuda.cudaEventRecord(bench.event, bench.a)
        bench.cuda.cudaStreamWaitEvent(bench.b, bench.event, 0)
        bench.down(bench.b)
        bench.cuda.cudaEventRecord(bench.event, bench.b)
        bench.cuda.cudaEventSynchronize(bench.event)
        assert bench.host(bench.got)[0] == value
    bench.machine.run_out()
    bench.cuda.cudaFree(bench.buffer)


@POLICY
def test_streams_without_an_event_between_them_race(policy: str) -> None:
    bench = Bench(policy)
    with pytest.raises(Fault, match="without waiting for"):
        bench.up(bench.a)
        bench.down(bench.b)
        bench.machine.run_out()


@POLICY
def test_an_event_recorded_too_early_orders_nothing(policy: str) -> None:
    bench = Bench(policy)
    with pytest.raises(Fault, match="without waiting for"):
        bench.cuda.cudaEventRecord(bench.event, bench.a)
        bench.up(bench.a)
        bench.cuda.cudaStreamWaitEvent(bench.b, bench.event, 0)
        bench.down(bench.b)
        bench.machine.run_out()


def test_a_source_overwritten_before_it_is_copied() -> None:
    bench = Bench("late")
    bench.host(bench.sent)[0] = 1
    bench.up(bench.a)
    bench.host(bench.sent)[0] = 2
    with pytest.raises(Fault, match=r"the host wrote buffer \d+ \(\) before upload"):
        bench.machine.run_out()


def test_what_is_read_before_it_has_arrived_is_poison() -> None:
    bench = Bench("late")
    bench.host(bench.sent)[0] = 1
    bench.up(bench.a)
    bench.down(bench.a)
    assert bench.host(bench.got)[0] == -1


@POLICY
def test_memory_freed_in_use(policy: str) -> None:
    bench = Bench(policy)
    with pytest.raises(Fault, match="freed"):
        bench.up(bench.a)
        bench.cuda.cudaFree(bench.buffer)
        bench.machine.run_out()


def test_freed_and_wild_memory() -> None:
    bench = Bench("early")
    bench.cuda.cudaFree(bench.buffer)
    with pytest.raises(Fault, match="after it was freed"):
        bench.up(bench.a)
    with pytest.raises(Fault, match="not allocated as one"):
        bench.cuda.cudaMemcpyAsync(bench.buffer + 10**6, bench.sent, 8, "up", bench.a)


def test_waiting_for_ever_is_noticed() -> None:
    """Two streams that wait for one another, which takes an event recorded behind a wait for a later one."""
    for policy in ("late", "random"):
        bench = Bench(policy)
        stream, mark = bench.cuda.streams[bench.a], type(bench.machine.record(bench.cuda.streams[bench.b]))()
        bench.machine.wait(stream, mark)
        bench.cuda.cudaEventRecord(bench.event, bench.a)
        with pytest.raises(Fault, match="for ever"):
            bench.cuda.cudaEventSynchronize(bench.event)


def test_captured_work_runs_when_it_is_launched_and_only_then() -> None:
    bench = Bench("early")
    bench.host(bench.sent)[0] = 7
    bench.cuda.cudaStreamBeginCapture(bench.a, 1)
    bench.up(bench.a)
    graph = bench.cuda.cudaGraphInstantiate(bench.cuda.cudaStreamEndCapture(bench.a)[1], 0)[1]
    assert not bench.machine.timeline
    for _ in range(2):
        bench.cuda.cudaGraphLaunch(graph, bench.a)
    assert len(bench.machine.timeline) == 2


def test_a_context_changed_after_capture(folder: Path) -> None:
    """What TensorRT leaves undefined: each captured graph needs a context of its own."""
    bench = Bench("early")
    library = simulated_tensorrt.TensorRt(bench.cuda)
    engine = library.Runtime(None).deserialize_cuda_engine(simulated_tensorrt.plan(folder / "graphs/fusion.onnx"))
    assert engine is not None
    context = engine.create_execution_context(2)
    context.set_input_shape("k", (1,))
    context.captured = True
    with pytest.raises(Fault, match="changed after a graph was captured"):
        context.set_input_shape("k", (1,))


def test_the_simulated_names_are_those_of_cuda() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    names = [name for name in dir(Cuda) if name.startswith("cuda")]
    assert len(names) > 25
    for name in names:
        assert hasattr(real, name), name
        if callable(getattr(Cuda, name)):
            signature = (getattr(real, name).__doc__ or "").split("\n")[0]
            taken = len(inspect.signature(getattr(Cuda, name)).parameters) - 1
            given = signature[signature.index("(") + 1 : signature.rindex(")")]
            assert taken == (given.count(",") + 1 if given else 0), signature


def test_the_simulated_names_are_those_of_tensorrt() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    for here, there in (("Engine", "ICudaEngine"), ("Context", "IExecutionContext"), ("WeightsManager", "IWeightsManager")):
        public = [
            name for name in vars(getattr(simulated_tensorrt, here)) if name.startswith(("get_", "set_", "create_", "execute", "is_"))
        ]
        for name in (*public, *(["device_memory_size_v2", "num_io_tensors"] if here == "Engine" else [])):
            assert hasattr(getattr(real, there), name), name
    assert {"DEVICE", "HOST"} == set(real.TensorLocation.__members__)
    assert hasattr(real.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert all(hasattr(real.ILogger.Severity, name) for name in ("ERROR", "INTERNAL_ERROR"))
    assert all(hasattr(real.DataType, name) for name, _ in TYPES.values())
