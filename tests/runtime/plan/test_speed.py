"""Tokens per second, against the arithmetic."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime.plan.devices import device_named
from fusionroute.runtime.plan.efficiency import Efficiency
from fusionroute.runtime.plan.fits import fit_of
from fusionroute.runtime.plan.memory import memory_of
from fusionroute.runtime.plan.shapes import shape_of
from fusionroute.runtime.plan.speed import Range, Text, decode_speed, prefill_speed
from fusionroute.runtime.plan.systems import of_shape

CONTEXT = 4096


def speed(experts: int, text: Text, device: str = "agx-orin-64gb", shared: bool = False, size: str = "3B") -> Range:
    board = device_named(device)
    system = of_shape(shape_of("llama3", size), experts, CONTEXT, shared, 16).build(board.target, "int8")
    return decode_speed(system, board, memory_of(system, board, CONTEXT), CONTEXT, text)


def test_one_model_reads_its_weights_and_half_of_its_keys_for_each_token() -> None:
    shape, fit = shape_of("llama3", "3B"), fit_of("gpu")
    assert isinstance(fit, Efficiency)
    read = (shape.body + shape.head) * 8.1 / 8 + 4 * shape.vectors
    keys = 2 * 28 * 8 * 128 * 2 * CONTEXT / 2
    seconds = (read + keys) / (204.8e9 * fit.share * (8.1 / 16) ** fit.slope) + fit.per_layer * 28
    low, expected, high = speed(0, Text(0.0))
    assert expected == pytest.approx(1 / seconds, rel=1e-6)
    assert (low, high) == pytest.approx((expected / fit.spread, expected * fit.spread))


def test_router_and_expert_take_twice_as_long_as_one_model() -> None:
    assert speed(1, Text(0.0))[1] == pytest.approx(speed(0, Text(0.0))[1] / 2, rel=1e-6)


def test_one_base_reads_its_weights_once() -> None:
    whole, shared = speed(3, Text(0.0))[1], speed(3, Text(0.0), shared=True)[1]
    assert 1.4 < shared / whole < 2
    assert speed(3, Text(0.5), shared=True)[1] < 0.75 * shared  # every second guess is wrong


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_switches_only_cost(rate: float, more: float) -> None:
    often = min(rate + more, 1.0)
    assert speed(3, Text(often))[1] <= speed(3, Text(rate))[1] * (1 + 1e-9)
    low, expected, high = speed(3, Text(rate))
    assert low <= expected <= high


def test_evicted_experts_cost_a_transfer_at_each_switch() -> None:
    board = device_named("rtx-3060-12gb")
    system = of_shape(shape_of("llama3", "3B"), 3, CONTEXT, False, 1).build("tensorrt", "int8")
    memory = memory_of(system, board, CONTEXT)
    assert memory.placement == "fits with evicting experts"
    evicted = 3 - memory.experts
    seldom, often = (1 / decode_speed(system, board, memory, CONTEXT, Text(rate, missed=0.0))[1] for rate in (0.1, 0.3))
    assert often - seldom == pytest.approx(0.2 * evicted / 2 * system.expert_bytes / board.link)


def test_drafts_pay_by_how_many_hold() -> None:
    plain = speed(3, Text(0.1))[1]
    speeds = [speed(3, Text(0.1, acceptance))[1] for acceptance in (0.0, 0.3, 0.6, 0.9)]
    assert speeds[0] == pytest.approx(plain)
    assert speeds == sorted(speeds) and 1.5 * plain < speeds[-1] < 8 * plain


def test_experts_that_never_switch_read_nothing_to_catch_up() -> None:
    assert speed(3, Text(0.0))[1] == speed(1, Text(0.0))[1]
    assert speed(3, Text(0.1, missed=0.0))[1] == speed(3, Text(0.0))[1]
    assert speed(3, Text(0.1))[1] < speed(3, Text(0.1, missed=0.0))[1]


def test_a_prompt_takes_as_many_operations_as_on_the_same_board_before() -> None:
    board = device_named("orin-nx-16gb")
    system = of_shape(shape_of("qwen3", "4B"), 0, CONTEXT, False, 1).build("tensorrt", "int4")
    low, expected, high = prefill_speed(system, board)
    assert low < 1089.1 < high  # measured there
    assert expected == pytest.approx(1089.1, rel=0.25)
    fused = of_shape(shape_of("qwen3", "4B"), 3, CONTEXT, False, 1).build("tensorrt", "int4")
    assert prefill_speed(fused, board)[1] == pytest.approx(expected / 2)
