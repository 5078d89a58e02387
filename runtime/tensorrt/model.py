"""Language models as engines: one stream each, KV caches written in place, decode steps as captured CUDA graphs.

Engines for TensorRT 10.3 return only the new keys and values, which are copied into the caches after the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.limits import reach
from fusionroute.runtime.manifest import Model as Spec
from fusionroute.runtime.tensorrt.answers import Answer, Known
from fusionroute.runtime.tensorrt.device import Graph, Stream
from fusionroute.runtime.tensorrt.keys_values import KeysValues, new_rows, token_bytes
from fusionroute.runtime.tensorrt.loading import Context, Engine, Weights
from fusionroute.runtime.tensorrt.residency import Residency
from fusionroute.runtime.tensorrt.shared import Scratch, Shared
from fusionroute.runtime.tensorrt.transfers import Block


class Model:
    """One language model's engine and stream. Sessions share both."""

    def __init__(
        self,
        engine: Engine,
        spec: Spec,
        shared: Shared,
        stream: Stream,
        scratch: Scratch,
        experts: int = 0,
        weights: Weights | None = None,
        residency: Residency | None = None,
    ):
        self.engine, self.spec, self.shared, self.stream, self.scratch, self.experts = engine, spec, shared, stream, scratch, experts
        self.weights, self.residency = weights, residency
        self.new_rows = new_rows(engine, spec, shared)

    def cache(self) -> Cache:
        """Device buffers of the full capacity."""
        return Cache(self)


class Cache:
    """One model's KV buffers and bound contexts for one session (see `runtime.backend.Cache`)."""

    def __init__(self, model: Model):
        self.model, self.length, self.shared, self.stream = model, 0, model.shared, model.stream
        shared, spec = model.shared, model.spec
        device = shared.device
        device.enter()
        self.done, self.read = device.event(), device.event()  # see `Pass`
        self._keys_values = KeysValues(spec, shared, token_bytes(model.engine, spec))
        self._inputs = Block(
            device,
            {
                "write_index": ((1,), np.int64),
                "logit_positions": ((shared.chunk,), np.int64),
                "input_ids": ((shared.chunk,), np.int64),
            },
        )
        self._outputs = self._buffers(1)
        self._addresses = {
            **self._inputs.addresses,
            **self._keys_values.addresses(model.new_rows),
            "key_positions": shared.key_positions.device,
        }
        self._steps: dict[int, tuple[Context, Graph | None]] = {}  # decode steps by the number of keys that they read
        self._chunks: Context | None = None
        with shared.lock:
            model.stream.zero(self._keys_values.memory)  # keys beyond the text are masked, but 0 · NaN is NaN

    def __del__(self) -> None:
        if hasattr(self, "_outputs"):
            self.model.shared.transfers.release(self._outputs.values(), self.done, self.read)

    def _settle(self) -> None:
        """Wait for the copies of the last pass.

        This costs nothing unless a step was interrupted, or a text is read in chunks.
        """
        for block in (self._inputs, *self._outputs.values()):
            self.model.shared.transfers.settle(block)

    def _buffers(self, row_count: int) -> dict[str, Block]:
        """Output blocks for `row_count` rows."""
        device, model = self.model.shared.device, self.model
        blocks = {"logits": Block(device, {"logits": ((row_count, model.shared.vocab), np.float32)})}
        if model.experts:
            blocks["routing"] = Block(device, {"routing": ((row_count, model.experts), np.float32)})
        return blocks

    def forward(self, ids: Sequence[int], positions: Sequence[int]) -> Any:
        """See `runtime.backend.Cache.forward`.

        One row stays on the device, and the pass may still run; for several rows it waits.
        """
        count, row_count, shared = len(ids), len(positions), self.model.shared
        if count > shared.chunk:
            raise InputError(f"{count} tokens at a time are more than the engines read: at most {shared.chunk}.")
        blocks = self._outputs if row_count == 1 else self._buffers(row_count)
        self._settle()
        arrays = self._inputs.arrays
        arrays["write_index"][0] = self.length
        arrays["input_ids"][:count] = ids
        arrays["logit_positions"][:row_count] = positions
        with shared.lock:
            shared.device.enter()
            self._queue(count, row_count, blocks)
            self.length += count
            if row_count == 1:
                return Answer(self, blocks["logits"], blocks.get("routing"))
            for block in blocks.values():
                shared.transfers.download(block, self.done)
        for block in blocks.values():
            shared.transfers.settle(block)
        rows = {name: block.arrays[name].copy() for name, block in blocks.items()}
        return Known(rows["logits"], rows.get("routing"))

    def interrupt(self) -> None:
        """See `runtime.backend.Cache.interrupt`: queued work cannot be stopped."""

    def _queue(self, count: int, row_count: int, blocks: dict[str, Block]) -> None:
        """Queue everything of one pass that runs on the device."""
        model = self.model
        stream, free = model.stream, model.scratch.free
        if model.residency is not None and model.weights is not None and free is not None:
            model.residency.bring(model.weights, stream, free)
        model.shared.transfers.upload(self._inputs, stream, self.done)
        if free is not None:
            stream.wait(free)
            stream.wait(self.read)
        if (count, row_count) == (1, 1):
            self._decode(reach(self.length + 1, model.shared.capacity))
        else:
            self._read(count, row_count, blocks)
        self._keys_values.append(stream, model.new_rows, self.length, count)
        stream.record(self.done)
        if free is not None:
            stream.record(free)

    def copy_prefix(self, other: Cache, length: int) -> None:
        """See `runtime.backend.Cache.copy_prefix`. Both caches are of one model, so its stream keeps the order."""
        model, shared = self.model, self.model.shared
        with shared.lock:
            shared.device.enter()
            self._keys_values.copy_prefix(model.stream, other._keys_values, length)
            model.stream.record(self.done)
            model.stream.record(other.done)  # its buffers may be freed after that
        self.length = length

    def _read(self, count: int, row_count: int, blocks: dict[str, Block]) -> None:
        """Read a chunk of any shape, in a context whose shapes change."""
        addresses = {name: block.device for name, block in blocks.items()}
        shapes = self._shapes(count, row_count, reach(self.length + count, self.model.shared.capacity))
        if self._chunks is None:
            self._chunks = self.model.engine.context(self.model.scratch.memory, self._addresses | addresses, shapes)
        else:
            self._chunks.bind(addresses)
            self._chunks.shape(shapes)
        self._chunks.run(self.model.stream)

    def _decode(self, keys: int) -> None:
        """Read one token.

        The first step that reads `keys` keys runs directly and is then captured, in a context that never changes.
        """
        stream = self.model.stream
        if (step := self._steps.get(keys)) is None:
            addresses = self._addresses | {name: block.device for name, block in self._outputs.items()}
            context = self.model.engine.context(self.model.scratch.memory, addresses, self._shapes(1, 1, keys))
            context.run(stream)
            graph = stream.capture(lambda: context.run(stream)) if context.capturable(stream) else None
            self._steps[keys] = context, graph
        elif (graph := step[1]) is not None:
            stream.launch(graph)
        else:
            step[0].run(stream)

    @staticmethod
    def _shapes(count: int, row_count: int, keys: int) -> dict[str, tuple[int, ...]]:
        return {"input_ids": (1, count), "write_index": (1,), "key_positions": (keys,), "logit_positions": (row_count,)}
