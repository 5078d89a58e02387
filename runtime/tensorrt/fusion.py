"""The fusion engine on the router's stream: both models' logits in, a few candidates back, the full row only where it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusionroute.runtime.backend import Fused, FusionInputs
from fusionroute.runtime.manifest import Profile
from fusionroute.runtime.tensorrt.device import Graph, Memory, Stream
from fusionroute.runtime.tensorrt.loading import Context, Engine
from fusionroute.runtime.tensorrt.model import Rows, Shared
from fusionroute.runtime.tensorrt.transfers import Block

OUTPUTS = {  # fields of backend.Fused → outputs of the fusion graph
    "ids": "candidate_ids", "logits": "candidate_logits", "unpenalised": "unpenalised", "log_normaliser": "log_normaliser",
    "sampling_normaliser": "sampling_normaliser",
}  # fmt: skip
NOTHING = np.zeros(1, np.int64)


@dataclass
class Buffers:
    """Buffers for K positions, k candidates and P penalised ids, and the runs on them by the addresses of both models' logits."""

    shape: tuple[int, int, int]
    inputs: Block
    candidates: Block
    rows: Block
    sent: bytes = b""
    steps: dict[tuple[int, int], tuple[Context, Graph | None]] = field(default_factory=dict)
    uploads: list[Block] = field(default_factory=list)  # logits that came from the host


class DeviceFused:
    """See `backend.Fused`: each array waits for the fusion at first use; `rows` is copied only then."""

    def __init__(self, fuser: DeviceFuser, plan: Buffers):
        self._fuser, self._plan = fuser, plan

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in OUTPUTS:
            raise AttributeError(f"A fusion has no '{name}': expected one of {', '.join(OUTPUTS)}, rows.")
        block = self._plan.candidates
        self._fuser.shared.transfers.settle(block)
        return block.arrays[OUTPUTS[name]]

    @property
    def rows(self) -> np.ndarray:
        """Fused and penalised logits, float32 [K, V]."""
        shared, block = self._fuser.shared, self._plan.rows
        shared.transfers.settle(self._plan.candidates)
        with shared.lock:
            shared.transfers.download(block, None)
        shared.transfers.settle(block)
        return block.arrays["fused"]


class DeviceFuser:
    """The fusion engine with one session's buffers (see `backend.Fuser`)."""

    def __init__(self, engine: Engine, shared: Shared, stream: Stream, scratch: Memory, profile: Profile):
        self.shared, self.done = shared, shared.device.event()
        self._engine, self._stream, self._scratch, self._profile = engine, stream, scratch, profile
        self._kept_buffers: dict[tuple[int, int, int], Buffers] = {}
        self._last: Buffers | None = None

    def __del__(self) -> None:
        if getattr(self, "_last", None) is not None:
            self._settle()  # its memory is freed next

    def _settle(self) -> None:
        """Wait for the last fusion and its copies, which were waited for already unless a step was given up."""
        if self._last is not None:
            self.shared.transfers.settle(self._last.candidates)
            self.shared.transfers.settle(self._last.rows)

    def __call__(self, inputs: FusionInputs) -> Any:
        """A DeviceFused, see `backend.Fuser`. `router` and `expert` are a model's `Rows`, or float32 [K, V] on the host.

        Nothing is waited for. Fewer than k candidates come back where the engine is built for fewer: sampling then reads the row.
        """
        router, expert, coefficients, k, penalty_ids, penalty, temperature = inputs
        if not len(penalty_ids):
            penalty_ids, penalty = NOTHING, 1.0  # changes nothing, and no tensor is empty
        penalised = min(1 << (len(penalty_ids) - 1).bit_length(), self._profile.penalised)
        k = min(k, self._profile.candidates)
        self._settle()
        plan = self._last = self._plan((len(router), k, penalised), keep=isinstance(router, Rows) and isinstance(expert, Rows))
        arrays = plan.inputs.arrays
        for name, value in (("coefficients", coefficients), ("penalty", penalty), ("temperature", temperature), ("k", k)):
            arrays[name][...] = value
        arrays["penalty_ids"][:, : len(penalty_ids)] = penalty_ids
        arrays["penalty_ids"][:, len(penalty_ids) :] = penalty_ids[-1]  # an id may stand twice
        with self.shared.lock:
            self.shared.device.enter()
            if plan.sent != (sent := b"".join(array.tobytes() for array in arrays.values())):
                self.shared.transfers.upload(plan.inputs, self._stream)
                plan.sent = sent
            self._run(plan, self._address(router, plan), self._address(expert, plan))
            self._stream.record(self.done)
            for rows in (router, expert):
                if isinstance(rows, Rows):
                    self._stream.record(rows.read)
            self.shared.transfers.download(plan.candidates, self.done)
        return DeviceFused(self, plan)

    def row(self, fused: Fused) -> np.ndarray:
        """See `backend.Fuser.row`."""
        row: np.ndarray = fused.rows[0].copy()
        return row

    def _address(self, rows: Any, plan: Buffers) -> int:
        """Where logits are on the device, and that the fusion waits for them; those on the host are uploaded."""
        if isinstance(rows, Rows):
            if rows.stream is not self._stream:
                self._stream.wait(rows.ready)
            return rows.block.device
        block = Block(self.shared.device, {"logits": (rows.shape, np.float32)})
        block.arrays["logits"][...] = rows
        self.shared.transfers.upload(block, self._stream)
        plan.uploads.append(block)
        return block.device

    def _run(self, plan: Buffers, router: int, expert: int) -> None:
        """Queue the fusion; from its second run at the same addresses on, as a captured graph."""
        if (step := plan.steps.get((router, expert))) is not None:
            context, graph = step
            if graph is not None:
                self._stream.launch(graph)
            else:
                context.run(self._stream)
            return
        positions, _, penalised = plan.shape
        vocab = self.shared.vocab
        addresses = {"router_logits": router, "expert_logits": expert}
        for block in (plan.inputs, plan.candidates, plan.rows):
            addresses |= block.addresses
        if "k" in self._engine.on_host:  # it decides a shape
            addresses["k"] = plan.inputs.arrays["k"].ctypes.data
        shapes = {"router_logits": (positions, vocab), "expert_logits": (positions, vocab), "penalty_ids": (positions, penalised)}
        context = self._engine.context(self._scratch, addresses, shapes)
        context.run(self._stream)
        graph = self._stream.capture(lambda: context.run(self._stream)) if not plan.uploads and context.capturable(self._stream) else None
        plan.steps[router, expert] = context, graph

    def _plan(self, shape: tuple[int, int, int], keep: bool) -> Buffers:
        """The buffers of a shape. Those of decoding are kept, those of scoring serve once."""
        if keep and shape in self._kept_buffers:
            return self._kept_buffers[shape]
        (positions, k, penalised), device = shape, self.shared.device
        inputs = {
            "coefficients": ((2,), np.float32),
            "penalty": ((), np.float32),
            "temperature": ((), np.float32),
            "k": ((1,), np.int64),
            "penalty_ids": ((positions, penalised), np.int64),
        }
        candidates = {
            "candidate_ids": ((positions, k), np.int64),
            "candidate_logits": ((positions, k), np.float32),
            "unpenalised": ((positions, k), np.float32),
            "log_normaliser": ((positions,), np.float32),
            "sampling_normaliser": ((positions,), np.float32),
        }
        plan = Buffers(
            shape, Block(device, inputs), Block(device, candidates), Block(device, {"fused": ((positions, self.shared.vocab), np.float32)})
        )
        if keep:
            self._kept_buffers[shape] = plan
        return plan
