"""One model's keys and values for one session, in device memory."""

from __future__ import annotations

from fusionroute.runtime.manifest import Model as Spec
from fusionroute.runtime.tensorrt.device import Memory, Stream, aligned
from fusionroute.runtime.tensorrt.loading import BYTES, Engine
from fusionroute.runtime.tensorrt.shared import Shared


def token_bytes(engine: Engine, spec: Spec) -> int:
    """Bytes of one token in one cache. 0 for an engine without caches, which `fit.check` refuses."""
    return spec.kv_heads * spec.head_size * BYTES.get(engine.types.get("past.0.key", ""), 0)


def new_rows(engine: Engine, spec: Spec, shared: Shared) -> Memory | None:
    """Memory for the new rows of one pass, where an engine returns these only; else None."""
    size = 2 * spec.layers * aligned(token_bytes(engine, spec) * shared.chunk)
    return shared.device.memory(size) if "new.0.key" in engine.types else None


class KeysValues:
    """Buffers [1, kv_heads, capacity, head_size] of one token's `each` bytes, per layer and kind.

    Engines write them in place; or they return the new rows in memory that all sessions share, from where `append`
    copies them before the stream goes on.
    """

    def __init__(self, spec: Spec, shared: Shared, each: int):
        self.spec, self._shared, self._each = spec, shared, each
        pitch = aligned(each * shared.capacity)
        self._names = [f"{layer}.{kind}" for layer in range(spec.layers) for kind in ("key", "value")]
        self.memory = shared.device.memory(pitch * len(self._names))
        self._places = [self.memory.address + number * pitch for number in range(len(self._names))]

    def addresses(self, rows: Memory | None) -> dict[str, int]:
        """Of the inputs and outputs that an engine has for these buffers; `rows`: where it writes new rows."""
        addresses = {f"past.{name}": place for name, place in zip(self._names, self._places, strict=True)}
        if rows is None:
            return addresses | {f"present.{name}": place for name, place in zip(self._names, self._places, strict=True)}
        return addresses | {f"new.{name}": source for name, source in zip(self._names, self._sources(rows), strict=True)}

    def _sources(self, rows: Memory) -> list[int]:
        pitch = aligned(self._each * self._shared.chunk)
        return [rows.address + number * pitch for number in range(len(self._names))]

    def append(self, stream: Stream, rows: Memory | None, length: int, count: int) -> None:
        """Append so many new rows behind the first `length` tokens, where an engine has not written them in place.

        Not part of a captured graph: the address changes with every step.
        """
        heads, row = self.spec.kv_heads, self._each // self.spec.kv_heads
        pitch = self._shared.capacity * row
        for place, source in zip(self._places, [] if rows is None else self._sources(rows), strict=rows is not None):
            stream.copy_rows(place + length * row, pitch, source, count * row, count * row, heads)

    def copy_prefix(self, stream: Stream, other: KeysValues, length: int) -> None:
        """Take over the first `length` tokens of the same model's buffers."""
        row = self._each // self.spec.kv_heads
        pitch = self._shared.capacity * row
        for target, source in zip(self._places, other._places, strict=True):
            stream.copy_rows(target, pitch, source, pitch, length * row, self.spec.kv_heads)
