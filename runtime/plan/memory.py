"""Whether a system fits a device, and how many experts do where not all of them do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fusionroute.runtime.plan.devices import Device
from fusionroute.runtime.plan.systems import System
from fusionroute.runtime.plan.weights import packing

Placement = Literal["fits", "fits with evicting experts", "does not fit"]


@dataclass(frozen=True)
class Memory:
    """Bytes of a system on a device, for one session with a text of the whole context.

    experts: how many of them lie in memory at once; expert_memory: bytes that these take, the budget to run with where not
    all fit. context: tokens of the longest text for which the placement holds.
    """

    weights: int
    kv: int
    scratch: int
    reserved: int
    placement: Placement
    experts: int
    expert_memory: int
    context: int


def memory_of(system: System, device: Device, context: int) -> Memory:
    """Place a system: all of it; else the router and as many experts as have room; else nothing."""
    kv, scratch = system.kv_bytes(context), system.scratch_bytes(device.target)
    packed = packing(device.target, system.precision)
    router, *experts = (int(each.resident * packed) for each in system.weights)
    if system.shared:  # factors are not packed
        experts = [each.resident for each in system.weights[1:]]
    room = device.free - kv - scratch - router
    sizes = sorted(experts, reverse=True)
    placement: Placement = "does not fit"
    count, taken = 0, 0
    if room >= sum(sizes):
        placement, count, taken = "fits", len(sizes), sum(sizes)
    elif sizes and room >= sizes[0]:
        placement, count = "fits with evicting experts", room // sizes[0]
        taken = count * sizes[0]
    longest = max(room - taken + kv, 0) // max(system.kv_bytes(1), 1) if placement != "does not fit" else 0
    return Memory(router + sum(experts), kv, scratch, device.reserved, placement, count, taken, longest)
