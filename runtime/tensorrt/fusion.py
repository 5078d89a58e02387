"""The fusion engine, on the router's stream.

It reads both models' logits on the device; a few candidates come back, the full row only if read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusionroute.runtime.backend import Fused, Fuser, FusionInputs
from fusionroute.runtime.manifest import Profile
from fusionroute.runtime.tensorrt.answers import Rows
from fusionroute.runtime.tensorrt.device import Graph, Memory, Stream
from fusionroute.runtime.tensorrt.loading import Context, Engine
from fusionroute.runtime.tensorrt.shared import Shared
from fusionroute.runtime.tensorrt.transfers import Block

OUTPUTS = {  # fields of backend.Fused → outputs of the fusion graph
    "ids": "candidate_ids", "logits": "candidate_logits", "unpenalised": "unpenalised", "log_normaliser": "log_normaliser",
    "sampling_normaliser": "sampling_normaliser",
}  # fmt: skip
FIRST_ID = np.zeros(1, np.int64)


@dataclass
class Buffers:
    """Buffers for K positions, k candidates and P penalised ids.

    `steps`: contexts and captured graphs by the addresses of both models' logits.
    """

    shape: tuple[int, int, int]
    inputs: Block
    candidates: Block
    rows: Block
    sent: bytes = b""
    steps: dict[tuple[int, int], tuple[Context, Graph | None]] = field(default_factory=dict)
    uploads: list[Block] = field(default_factory=list)  # logits uploaded from the host


class DeviceFused:
    """See `runtime.backend.Fused`: each array waits for the fusion at first use; `rows` is copied only then."""

    def __init__(self, fuser: DeviceFuser, buffers: Buffers):
        self._fuser, self._buffers = fuser, buffers

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in OUTPUTS:
            raise AttributeError(f"A fusion has no '{name}': expected one of {', '.join(OUTPUTS)}, rows.")
        block = self._buffers.candidates
        self._fuser.shared.transfers.settle(block)
        return block.arrays[OUTPUTS[name]]

    @property
    def rows(self) -> np.ndarray:
        """Fused and penalised logits, float32 [K, V]."""
        shared, block = self._fuser.shared, self._buffers.rows
        shared.transfers.settle(self._buffers.candidates)
        with shared.lock:
            shared.transfers.download(block, None)
        shared.transfers.settle(block)
        return block.arrays["fused"]


class DeviceFuser(Fuser):
    """The fusion engine with one session's buffers (see `runtime.backend.Fuser`)."""

    def __init__(self, engine: Engine, shared: Shared, stream: Stream, scratch: Memory, profile: Profile):
        self.shared, self.done = shared, shared.device.event()
        self._engine, self._stream, self._scratch, self._profile = engine, stream, scratch, profile
        self._decoding: dict[tuple[int, int, int], Buffers] = {}
        self._last: Buffers | None = None

    def __del__(self) -> None:
        if getattr(self, "_last", None) is not None:
            self._settle()  # its memory is freed next

    def _settle(self) -> None:
        """Wait for the last fusion and its copies.

        This costs nothing unless a step was interrupted: reading the results has waited.
        """
        if self._last is not None:
            self.shared.transfers.settle(self._last.candidates)
            self.shared.transfers.settle(self._last.rows)

    def __call__(self, inputs: FusionInputs) -> Any:
        """A DeviceFused, see `runtime.backend.Fuser`. `router` and `expert` are a model's `Rows`, or float32 [K, V] on
        the host.

        Waits for nothing. Returns fewer than k candidates where the engine has fewer: sampling then reads the row.
        """
        router, expert, coefficients, k, penalty_ids, penalty, temperature = inputs
        if not len(penalty_ids):
            penalty_ids, penalty = FIRST_ID, 1.0  # no penalty; no tensor may be empty
        penalised = min(1 << (len(penalty_ids) - 1).bit_length(), self._profile.penalised)
        k = min(k, self._profile.candidates)
        self._settle()
        buffers = self._last = self._buffers((len(router), k, penalised), keep=isinstance(router, Rows) and isinstance(expert, Rows))
        arrays = buffers.inputs.arrays
        for name, value in (("coefficients", coefficients), ("penalty", penalty), ("temperature", temperature), ("k", k)):
            arrays[name][...] = value
        arrays["penalty_ids"][:, : len(penalty_ids)] = penalty_ids
        arrays["penalty_ids"][:, len(penalty_ids) :] = penalty_ids[-1]  # to repeat an id changes nothing
        with self.shared.lock:
            self.shared.device.enter()
            if buffers.sent != (sent := b"".join(array.tobytes() for array in arrays.values())):
                self.shared.transfers.upload(buffers.inputs, self._stream)
                buffers.sent = sent
            self._run(buffers, self._address(router, buffers), self._address(expert, buffers))
            self._stream.record(self.done)
            for rows in (router, expert):
                if isinstance(rows, Rows):
                    self._stream.record(rows.read)
            self.shared.transfers.download(buffers.candidates, self.done)
        return DeviceFused(self, buffers)

    def row(self, fused: Fused) -> np.ndarray:
        """See `runtime.backend.Fuser.row`."""
        row: np.ndarray = fused.rows[0].copy()
        return row

    def _address(self, rows: Any, buffers: Buffers) -> int:
        """The address of logits on the device, which the fusion's stream waits for; logits on the host are uploaded."""
        if isinstance(rows, Rows):
            if rows.stream is not self._stream:
                self._stream.wait(rows.ready)
            return rows.block.device
        block = Block(self.shared.device, {"logits": (rows.shape, np.float32)})
        block.arrays["logits"][...] = rows
        self.shared.transfers.upload(block, self._stream)
        buffers.uploads.append(block)
        return block.device

    def _run(self, buffers: Buffers, router: int, expert: int) -> None:
        """Queue the fusion: from its second run at the same addresses on, as a captured graph."""
        if (step := buffers.steps.get((router, expert))) is not None:
            context, graph = step
            if graph is not None:
                self._stream.launch(graph)
            else:
                context.run(self._stream)
            return
        positions, _, penalised = buffers.shape
        vocab = self.shared.vocab
        addresses = {"router_logits": router, "expert_logits": expert}
        for block in (buffers.inputs, buffers.candidates, buffers.rows):
            addresses |= block.addresses
        if "k" in self._engine.on_host:  # it decides a shape, so TensorRT reads it on the host
            addresses["k"] = buffers.inputs.arrays["k"].ctypes.data
        shapes = {"router_logits": (positions, vocab), "expert_logits": (positions, vocab), "penalty_ids": (positions, penalised)}
        context = self._engine.context(self._scratch, addresses, shapes)
        context.run(self._stream)
        graph = (
            self._stream.capture(lambda: context.run(self._stream)) if not buffers.uploads and context.capturable(self._stream) else None
        )
        buffers.steps[router, expert] = context, graph

    def _buffers(self, shape: tuple[int, int, int], keep: bool) -> Buffers:
        """The buffers for a shape. Decoding's are used again; scoring's serve once."""
        if keep and shape in self._decoding:
            return self._decoding[shape]
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
        buffers = Buffers(
            shape, Block(device, inputs), Block(device, candidates), Block(device, {"fused": ((positions, self.shared.vocab), np.float32)})
        )
        if keep:
            self._decoding[shape] = buffers
        return buffers
