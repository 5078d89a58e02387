"""How fast a system is expected to read and to write, from what a pass takes by the fits.

A token costs the router's pass and the expert's, or with one base the pass of both and another for each wrong guess.
A switch of experts lets the new one read what it missed, and brings its weights back where they were evicted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

from fusionroute.runtime.backends.ort_cpu import TARGET as CPU
from fusionroute.runtime.limits import MAX_ROUND_TOKENS
from fusionroute.runtime.plan.devices import Device
from fusionroute.runtime.plan.fits import Fit, fit_of
from fusionroute.runtime.plan.measurements import Measurement, Pass, measurements
from fusionroute.runtime.plan.memory import Memory
from fusionroute.runtime.plan.processors import CORES
from fusionroute.runtime.plan.systems import System
from fusionroute.runtime.tensorrt.library import TARGET as TENSORRT

NARROW = "nvfp4"
MEASURED_AS = {"bf16": "fp16", "int8-wo": "int4"}  # weights that are only stored narrow are multiplied in half precision
MOST_SWITCHES = 0.5  # of the tokens, in the low estimate at most

Range = tuple[float, float, float]  # low, expected, high


@dataclass(frozen=True)
class Text:
    """What the texts are like. switch_rate: share of the tokens that come from another expert than the one before.
    acceptance: share of drafted tokens that are right; None: without drafts. missed: tokens that experts read to catch
    up, per token; None: in the long run every expert reads every token.
    """

    switch_rate: float
    acceptance: float | None = None
    missed: float | None = None


def prefill_operations(device: Device, precision: str) -> Range:
    """Operations per second of reading prompts: what was measured on the device, in this precision if it was, else on
    all devices by the bandwidth of each, on processors by their cores. NVFP4 multiplies in 4 bits, so it says nothing
    of other precisions.
    """
    measured_as = MEASURED_AS.get(precision, precision)
    rows = [row for row in measurements(device.kind) if row.prefill and (row.precision != NARROW or measured_as == NARROW)]
    alike = [row for row in rows if row.precision == measured_as]
    own = [row for row in rows if row.device == device.name]
    known = [row for row in own if row.precision == measured_as] or own or alike or rows
    scales = [device.bandwidth / row.bandwidth if device.kind == "gpu" else device.cores / CORES for row in known]
    rates = [operations(row) * scale for row, scale in zip(known, scales, strict=True)]
    spread = fit_of(device.kind).spread
    return min(rates) / spread, median(rates), max(rates) * spread


def operations(row: Measurement) -> float:
    """Operations per second that a measured prompt took."""
    return 2 * row.values * (row.prefill or 0)


def decode_speed(system: System, device: Device, memory: Memory, context: int, text: Text) -> Range:
    """Tokens per second, behind a text that fills half of the context."""
    fit, prefill = fit_of(device.kind), prefill_operations(device, system.precision)
    often = max(text.switch_rate, min(2 * text.switch_rate, MOST_SWITCHES))
    low = seconds(system, device, memory, context, replace(text, switch_rate=often), fit, prefill[0])
    expected = seconds(system, device, memory, context, text, fit, prefill[1])
    high = seconds(system, device, memory, context, replace(text, switch_rate=0.0, missed=None), fit, prefill[2])
    return 1 / (low * fit.spread), 1 / expected, fit.spread / high


def prefill_speed(system: System, device: Device) -> Range:
    """Tokens per second of a prompt, which the router reads and then the expert that it chose."""
    values = sum(max(each.values for each in part) for part in (system.weights[:1], system.weights[1:2]) if part)
    if system.shared:  # the expert's tokens pass the base too
        values += system.weights[0].values
    least, middle, most = prefill_operations(device, system.precision)
    return least / (2 * values), middle / (2 * values), most / (2 * values)


def seconds(system: System, device: Device, memory: Memory, context: int, text: Text, fit: Fit, prefill: float) -> float:
    """Of one token, without or with drafts."""

    def of_step(tokens: int) -> float:
        return step(system, device, memory, context, text, fit, prefill, tokens)

    return of_step(1) if text.acceptance is None else drafted(of_step, text.acceptance)


def step(system: System, device: Device, memory: Memory, context: int, text: Text, fit: Fit, prefill: float, tokens: int) -> float:
    """Of one step in which every pass reads `tokens` tokens."""
    captured = device.target in (TENSORRT, CPU)

    def of_pass(read: int, kv_values: int, layers: float, values: int, rows: int) -> float:
        keys = kv_values * system.kv_bits * context // 16
        one = fit.seconds(Pass(read + keys, layers, system.bits, values, device.bandwidth, captured, device.cores))
        return one + (rows - 1) * 2 * values / prefill

    router, layers, kv = system.weights[0], system.layers[0], system.kv_values[0]
    if len(system.weights) == 1:
        return of_pass(router.read, kv, layers, router.values, tokens)
    expert = max(system.weights[1:], key=lambda each: each.read)
    others = len(system.weights) - 2
    whole = router if system.shared else expert
    missed = (others if text.missed is None and text.switch_rate else text.missed or 0.0) * 2 * whole.values / prefill
    evicted = len(system.weights) - 1 - memory.experts
    returning = text.switch_rate * evicted / max(others, 1) * expert.resident / device.link
    if system.shared:
        both = of_pass(router.read + expert.read, kv + system.kv_values[1], 2 * layers, router.values + expert.values, 2 * tokens)
        return (1 + text.switch_rate) * both + missed + returning
    apart = of_pass(router.read, kv, layers, router.values, tokens)
    return apart + of_pass(expert.read, system.kv_values[1], system.layers[1], expert.values, tokens) + missed + returning


def drafted(of_step: Callable[[int], float], acceptance: float) -> float:
    """Of one token where drafts cost nothing, for the number of drafts that pays best."""
    best = of_step(1)
    for drafts in range(1, MAX_ROUND_TOKENS):
        gained = sum(acceptance**number for number in range(drafts + 1))  # the token itself, and each draft that holds
        best = min(best, of_step(drafts + 1) / gained)
    return best
