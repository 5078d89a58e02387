"""What others measured: decoded tokens per second of one model on one device, each row with its source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from fusionroute.runtime.plan.data_files import read
from fusionroute.runtime.plan.devices import Kind, device_named
from fusionroute.runtime.plan.shapes import shape_of

KV_WIDTH = 2  # bytes; all rows keep keys and values in half precision
WITH_VNNI: Kind = "cpu with VNNI"
UNSURE = 1.25  # a row whose bytes may be so many times others is not fitted to: its source does not say which


class Pass(NamedTuple):
    """One pass of one model: the bytes that it reads, of weights with so many bits; its layers; values that are
    multiplied; bytes/s of the memory; whether the step is captured as one CUDA graph; cores of a processor.
    """

    read: float
    layers: float
    bits: float
    values: float
    bandwidth: float
    captured: bool = True
    cores: int = 2


@dataclass(frozen=True)
class Measurement:
    """One row. bits: of a weight of the layers. bytes: that a token reads, at least and at most, where the source does
    not say how the head is stored. captured: whether its runtime replays a step as one CUDA graph. decode, prefill:
    tokens/s, None where not given. url: where it was read.
    """

    device: str
    model: str
    precision: str
    bits: float
    layers: int
    values: int
    bytes: tuple[float, float]
    bandwidth: float
    captured: bool
    decode: float
    prefill: float | None
    url: str

    @property
    def read(self) -> float:
        """Bytes that a token reads, the middle of what is known."""
        return sum(self.bytes) / 2

    @property
    def work(self) -> Pass:
        """What a token takes."""
        return Pass(self.read, self.layers, self.bits, self.values, self.bandwidth, self.captured)

    @property
    def sure(self) -> bool:
        """Whether the source says enough to count bytes."""
        return self.bytes[1] <= UNSURE * self.bytes[0]


@cache
def measurements(kind: Kind = "gpu") -> tuple[Measurement, ...]:
    """All rows of GPUs, or of processors: those with VNNI multiply bytes several times as fast as others."""
    tables = read("measurements")
    rows = []
    for row in tables["rows" if kind == "gpu" else "cpu_rows"]:
        if kind == WITH_VNNI and not tables["sources"][row["source"]]["vnni"]:
            continue
        shape, fmt = shape_of(row["family"], row["size"]), tables["formats"][row["format"]]
        kv = shape.kv_values * row.get("kv_width", KV_WIDTH) * row["context"]
        least, most = (
            (shape.body * body + shape.head * head) / 8 + kv for body, head in zip(fmt["body_bits"], fmt["head_bits"], strict=True)
        )
        rows.append(
            Measurement(
                device=row["device"],
                model=shape.name,
                precision=fmt["precision"],
                bits=fmt["body_bits"][0],
                layers=shape.layers,
                values=shape.body + shape.head,
                bytes=(least, most),
                bandwidth=row["bandwidth"] if "bandwidth" in row else device_named(row["device"]).bandwidth,
                captured=tables["sources"][row["source"]].get("captured", True),
                decode=row["decode"],
                prefill=row.get("prefill"),
                url=tables["sources"][row["source"]]["url"],
            )
        )
    return tuple(rows)
