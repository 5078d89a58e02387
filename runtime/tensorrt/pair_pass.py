"""Passes of one engine that reads tokens of the router and tokens of an expert: what they read and write besides keys
and values, their contexts, and decode steps as captured CUDA graphs.

Neither text may be empty: where one model reads alone, a dummy token stands for the other one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fusionroute.runtime.backend import Segment
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.limits import EXPERT, reach
from fusionroute.runtime.manifest import Model as Spec
from fusionroute.runtime.tensorrt.answers import Answer, Known
from fusionroute.runtime.tensorrt.device import Graph, Memory, Stream
from fusionroute.runtime.tensorrt.factors import FactorSlots, Slot
from fusionroute.runtime.tensorrt.keys_values import KeysValues
from fusionroute.runtime.tensorrt.loading import Context, Engine
from fusionroute.runtime.tensorrt.shared import Shared
from fusionroute.runtime.tensorrt.transfers import Block

IDLE = Segment((0,), ())  # of a model that does not read
PREFIXES = ("", EXPERT)
ROWS = ("logits", "routing", f"{EXPERT}logits")


class PairEngine(NamedTuple):
    """The engine of all models, on one stream with the fusion. `rows`: memory for the new rows of router and expert.

    idle: keys and values of a model that does not read, which all sessions write.
    """

    engine: Engine
    spec: Spec
    shared: Shared
    stream: Stream
    scratch: Memory
    experts: int
    factors: FactorSlots
    rows: tuple[Memory | None, Memory | None]
    idle: KeysValues


class PairPass:
    """The passes that two texts share: keys and values of the router's and of an expert's, None for one that is idle.

    number: of the expert; None where it is idle.
    """

    def __init__(self, pair: PairEngine, router: KeysValues | None, expert: KeysValues | None, number: int | None):
        self._pair, self._texts, self._number = pair, (router, expert), number
        self.shared, self.stream = pair.shared, pair.stream
        device = self.shared.device
        device.enter()
        self.done, self.read = device.event(), device.event()  # see `Pass`
        chunk = self.shared.chunk
        small = {"write_index": (1,), "logit_positions": (chunk,), "input_ids": (chunk,)}
        self._inputs = Block(device, {prefix + name: (shape, np.int64) for prefix in PREFIXES for name, shape in small.items()})
        self._outputs = self._buffers((1, 1))
        self._addresses = dict(self._inputs.addresses)
        for prefix, text, rows in zip(PREFIXES, self._texts, pair.rows, strict=True):
            own = (text or pair.idle).addresses(rows) | {"key_positions": self.shared.key_positions.device}
            self._addresses |= {prefix + name: address for name, address in own.items()}
        # decode steps by the keys that router and expert read, and by the expert's slot
        self._steps: dict[tuple[tuple[int, int], Slot], tuple[Context, Graph | None]] = {}
        self._chunks: Context | None = None

    def __del__(self) -> None:
        if hasattr(self, "_outputs"):
            self.shared.transfers.release(self._outputs.values(), self.done, self.read)

    def _buffers(self, rows: tuple[int, int]) -> dict[str, Block]:
        """Output blocks for so many rows of router and expert."""
        vocab, experts = self.shared.vocab, self._pair.experts
        sizes = dict(zip(ROWS, ((rows[0], vocab), (rows[0], experts), (rows[1], vocab)), strict=True))
        return {name: Block(self.shared.device, {name: (size, np.float32)}) for name, size in sizes.items()}

    def run(self, segments: tuple[Segment, Segment], lengths: tuple[int, int]) -> tuple[Any, Any]:
        """One pass of the router's segment and the expert's behind so many tokens: the outputs of both.

        One row of each stays on the device, and the pass may still run; for several rows of one it waits. Raises
        InputError for more tokens than the engine reads.
        """
        shared = self.shared
        counts = len(segments[0].ids), len(segments[1].ids)
        if max(counts) > shared.chunk:
            raise InputError(f"{max(counts)} tokens at a time are more than the engine reads: at most {shared.chunk}.")
        rows = max(1, len(segments[0].positions)), max(1, len(segments[1].positions))
        blocks = self._outputs if rows == (1, 1) else self._buffers(rows)
        for block in (self._inputs, *self._outputs.values()):
            shared.transfers.settle(block)  # costs nothing unless a step was interrupted, or a text is read in chunks
        for prefix, segment, length in zip(PREFIXES, segments, lengths, strict=True):
            arrays = self._inputs.arrays
            arrays[f"{prefix}write_index"][0] = length
            arrays[f"{prefix}input_ids"][: len(segment.ids)] = segment.ids
            positions = segment.positions if len(segment.positions) else (0,)
            arrays[f"{prefix}logit_positions"][: len(positions)] = positions
        asked = [name for name, text in zip(ROWS, (segments[0], segments[0], segments[1]), strict=True) if len(text.positions)]
        with shared.lock:
            shared.device.enter()
            self._queue(counts, rows, lengths, blocks)
            if rows == (1, 1):
                return Answer(self, blocks["logits"], blocks["routing"]), Answer(self, blocks[f"{EXPERT}logits"], None)
            for name in asked:
                shared.transfers.download(blocks[name], self.done)
        for name in asked:
            shared.transfers.settle(blocks[name])
        logits, routing, expert = (blocks[name].arrays[name].copy() for name in ROWS)
        return Known(logits, routing), Known(expert, None)

    def _queue(self, counts: tuple[int, int], rows: tuple[int, int], lengths: tuple[int, int], blocks: dict[str, Block]) -> None:
        """Queue everything of one pass that runs on the device."""
        factors, stream = self._pair.factors, self.stream
        slot = factors.bring(self._number)
        self.shared.transfers.upload(self._inputs, stream, self.done)
        capacity = self.shared.capacity
        keys = reach(lengths[0] + counts[0], capacity), reach(lengths[1] + counts[1], capacity)
        if counts == rows == (1, 1):
            self._decode(keys, slot)
        else:
            self._read(shapes(counts, rows, keys), blocks, slot)
        for text, new, length, count in zip(self._texts, self._pair.rows, lengths, counts, strict=True):
            if text is not None:
                text.append(stream, new, length, count)
        stream.record(self.done)
        factors.used(slot)

    def _read(self, sizes: dict[str, tuple[int, ...]], blocks: dict[str, Block], slot: Slot) -> None:
        """Read chunks of any shapes, in a context whose shapes change."""
        addresses = slot.addresses | {name: block.device for name, block in blocks.items()}
        if self._chunks is None:
            self._chunks = self._pair.engine.context(self._pair.scratch, self._addresses | addresses, sizes)
        else:
            self._chunks.bind(addresses)
            self._chunks.shape(sizes)
        self._chunks.run(self.stream)

    def _decode(self, keys: tuple[int, int], slot: Slot) -> None:
        """Read one token each.

        The first step that reads so many keys runs directly and is then captured, in a context that never changes.
        """
        stream = self.stream
        if (step := self._steps.get((keys, slot))) is None:
            addresses = self._addresses | slot.addresses | {name: block.device for name, block in self._outputs.items()}
            context = self._pair.engine.context(self._pair.scratch, addresses, shapes((1, 1), (1, 1), keys))
            context.run(stream)
            graph = stream.capture(lambda: context.run(stream)) if context.capturable(stream) else None
            self._steps[keys, slot] = context, graph
        elif (graph := step[1]) is not None:
            stream.launch(graph)
        else:
            step[0].run(stream)


def shapes(counts: tuple[int, int], rows: tuple[int, int], keys: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of an engine's inputs, for router and expert."""
    of_each = zip(PREFIXES, counts, rows, keys, strict=True)
    return {
        prefix + name: shape
        for prefix, count, row_count, key_count in of_each
        for name, shape in (
            ("input_ids", (1, count)),
            ("write_index", (1,)),
            ("key_positions", (key_count,)),
            ("logit_positions", (row_count,)),
        )
    }
