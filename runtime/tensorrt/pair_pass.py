"""Passes of one engine that reads tokens of the router and tokens of an expert: what they read and write besides keys
and values, their contexts, and decode steps as captured CUDA graphs.

Neither text may be empty: where one model reads alone, a dummy token stands for the other one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from fusionroute.runtime.backend import Segment
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.limits import EXPERT, reach
from fusionroute.runtime.manifest import Model as Spec
from fusionroute.runtime.tensorrt.answers import Answer, Known
from fusionroute.runtime.tensorrt.device import Device, Graph, Memory, Stream, aligned
from fusionroute.runtime.tensorrt.factors import FactorSlots, Slot
from fusionroute.runtime.tensorrt.keys_values import KeysValues
from fusionroute.runtime.tensorrt.loading import Context, Engine
from fusionroute.runtime.tensorrt.shared import Shared
from fusionroute.runtime.tensorrt.transfers import Block

PREFIXES = ("", EXPERT)
ROWS = (("logits", "routing"), ("logits",))  # what router and expert answer
Outputs = dict[str, Block]  # of one model, by name; empty where it does not read


class PairEngine(NamedTuple):
    """The engine of all models, on one stream with the fusion. `rows`: memory for the new rows of router and expert.
    scored: of the routing head's rows those that have an expert; None: all.

    idle: keys and values of a model that does not read, which all sessions write; unread: its answers, which nobody reads.
    """

    engine: Engine
    spec: Spec
    shared: Shared
    stream: Stream
    scratch: Memory
    head_rows: int
    scored: list[int] | None
    factors: FactorSlots
    rows: tuple[Memory | None, Memory | None]
    idle: KeysValues
    unread: Unread


class Unread:
    """Device memory for a row of each answer, without room for it on the host. `addresses`: by name."""

    def __init__(self, device: Device, vocab: int, experts: int):
        names = [prefix + name for prefix, own in zip(PREFIXES, ROWS, strict=True) for name in own]
        pitch = aligned(4 * max(vocab, experts))
        self._memory = device.memory(pitch * len(names))
        self.addresses = {name: self._memory.address + number * pitch for number, name in enumerate(names)}


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
        self._addresses = self._inputs.addresses | pair.unread.addresses  # those of outputs that are read are bound instead
        for prefix, text, rows in zip(PREFIXES, self._texts, pair.rows, strict=True):
            own = (text or pair.idle).addresses(rows) | {"key_positions": self.shared.key_positions.device}
            self._addresses |= {prefix + name: address for name, address in own.items()}
        # decode steps by the keys that router and expert read, and by the expert's slot
        self._steps: dict[tuple[tuple[int, int], Slot], tuple[Context, Graph | None]] = {}
        self._chunks: Context | None = None

    def __del__(self) -> None:
        if hasattr(self, "_outputs"):
            self.shared.transfers.release(blocks(self._outputs), self.done, self.read)

    def _buffers(self, rows: tuple[int, int]) -> list[Outputs]:
        """Output blocks for so many rows of router and expert."""
        widths = {"logits": self.shared.vocab, "routing": self._pair.head_rows}
        return [
            {name: Block(self.shared.device, {name: ((count, widths[name]), np.float32)}) for name in names if text is not None}
            for names, text, count in zip(ROWS, self._texts, rows, strict=True)
        ]

    def run(self, segments: tuple[Segment, Segment], lengths: tuple[int, int]) -> tuple[Any, Any]:
        """One pass of the router's segment and the expert's behind so many tokens: the outputs of both, None of one that is
        idle.

        One row of each stays on the device, and the pass may still run; for several rows of one it waits. Raises
        InputError for more tokens than the engine reads.
        """
        shared, scored = self.shared, self._pair.scored
        counts = len(segments[0].ids), len(segments[1].ids)
        if max(counts) > shared.chunk:
            raise InputError(f"{max(counts)} tokens at a time are more than the engine reads: at most {shared.chunk}.")
        rows = max(1, len(segments[0].positions)), max(1, len(segments[1].positions))
        outputs = self._outputs if rows == (1, 1) else self._buffers(rows)
        for block in (self._inputs, *blocks(self._outputs)):
            shared.transfers.settle(block)  # costs nothing unless a step was interrupted, or a text is read in chunks
        for prefix, segment, length in zip(PREFIXES, segments, lengths, strict=True):
            arrays = self._inputs.arrays
            arrays[f"{prefix}write_index"][0] = length
            arrays[f"{prefix}input_ids"][: len(segment.ids)] = segment.ids
            positions = segment.positions if len(segment.positions) else (0,)
            arrays[f"{prefix}logit_positions"][: len(positions)] = positions
        with shared.lock:
            shared.device.enter()
            self._queue(counts, rows, lengths, outputs)
            if rows == (1, 1):
                first, second = (Answer(self, own["logits"], own.get("routing"), scored) if own else None for own in outputs)
                return first, second
            for block in blocks(outputs):
                shared.transfers.download(block, self.done)
        for block in blocks(outputs):
            shared.transfers.settle(block)
        copies = [{name: block.arrays[name].copy() for name, block in own.items()} for own in outputs]
        if scored is not None and "routing" in copies[0]:
            copies[0]["routing"] = copies[0]["routing"][:, scored]
        router, expert = (Known(own["logits"], own.get("routing")) if own else None for own in copies)
        return router, expert

    def _queue(self, counts: tuple[int, int], rows: tuple[int, int], lengths: tuple[int, int], outputs: list[Outputs]) -> None:
        """Queue everything of one pass that runs on the device."""
        factors, stream = self._pair.factors, self.stream
        slot = factors.bring(self._number)
        self.shared.transfers.upload(self._inputs, stream, self.done)
        capacity = self.shared.capacity
        keys = reach(lengths[0] + counts[0], capacity), reach(lengths[1] + counts[1], capacity)
        if counts == rows == (1, 1):
            self._decode(keys, slot)
        else:
            self._read(shapes(counts, rows, keys), outputs, slot)
        for text, new, length, count in zip(self._texts, self._pair.rows, lengths, counts, strict=True):
            if text is not None:
                text.append(stream, new, length, count)
        stream.record(self.done)
        factors.used(slot)

    def _read(self, sizes: dict[str, tuple[int, ...]], outputs: list[Outputs], slot: Slot) -> None:
        """Read chunks of any shapes, in a context whose shapes change."""
        addresses = slot.addresses | places(outputs)
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
            addresses = self._addresses | slot.addresses | places(self._outputs)
            context = self._pair.engine.context(self._pair.scratch, addresses, shapes((1, 1), (1, 1), keys))
            context.run(stream)
            graph = stream.capture(lambda: context.run(stream)) if context.capturable(stream) else None
            self._steps[keys, slot] = context, graph
        elif (graph := step[1]) is not None:
            stream.launch(graph)
        else:
            step[0].run(stream)


def blocks(outputs: Iterable[Outputs]) -> list[Block]:
    """All blocks of both models."""
    return [block for own in outputs for block in own.values()]


def places(outputs: Iterable[Outputs]) -> dict[str, int]:
    """The addresses of an engine's outputs that are read."""
    return {prefix + name: block.device for prefix, own in zip(PREFIXES, outputs, strict=True) for name, block in own.items()}


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
