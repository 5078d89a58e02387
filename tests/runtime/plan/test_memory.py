"""Bytes, and what fits."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.plan.devices import Device, described, device_named, parsed_bytes
from fusionroute.runtime.plan.memory import Memory, memory_of
from fusionroute.runtime.plan.shapes import shape_of
from fusionroute.runtime.plan.systems import System, of_bundle, of_shape
from fusionroute.runtime.plan.weights import Weights

ORDER = ("does not fit", "fits with evicting experts", "fits")


@pytest.mark.parametrize("number", range(4))
def test_a_bundles_weights_are_those_of_its_files(number: int, all_bundles: list[Path]) -> None:
    """Counted by the package onnx: the lengths of external data, each place once, and the raw bytes of the rest."""
    onnx = pytest.importorskip("onnx")
    bundle = Bundle.open(all_bundles[number])
    for variant in bundle.manifest.variants:
        system = of_bundle(bundle, None).build(variant.target, variant.precision)
        sizes = {name: counted(onnx, bundle.folder / path) for name, path in variant.graphs.items()}
        if variant.pair is not None:
            sizes["router"] = sum(counted(onnx, bundle.folder / path) for path in variant.pair.graph_paths)
            sizes |= {name: (bundle.folder / path).stat().st_size for name, path in variant.pair.factors.items()}
        assert [each.resident for each in system.weights] == [sizes[model.name] for model in bundle.manifest.models]
        assert [each.read for each in system.weights] == [variant.weight_bytes[model.name] for model in bundle.manifest.models]


def counted(onnx: Any, path: Path) -> int:
    graph = onnx.load(path, load_external_data=False).graph
    constants = [each.t for node in graph.node for each in node.attribute if each.HasField("t")]
    places, own = {}, 0
    for tensor in [*graph.initializer, *constants]:
        place = {each.key: each.value for each in tensor.external_data}
        if place:
            places[place["location"], place["offset"]] = int(place["length"])
        else:
            own += len(tensor.raw_data)
    return own + sum(places.values())


def test_a_model_in_half_precision_takes_two_bytes_for_each_parameter() -> None:
    for family, size in (("llama3", "8B"), ("gemma2", "2B"), ("qwen2", "7B")):
        shape = shape_of(family, size)
        system = of_shape(shape, 0, 4096, False, 1).build("tensorrt", "fp16")
        assert system.weight_bytes == 2 * shape.parameters + 2 * shape.vectors  # norms and biases stay fp32
        assert system.kv_bytes(4096) == 4096 * 2 * shape.layers * shape.kv_heads * shape.head_size * 2


def test_an_expert_on_one_base_costs_its_factors() -> None:
    shape = shape_of("llama3", "1B")
    whole = of_shape(shape, 3, 2048, False, 1).build("ort:cpu", "int8")
    shared = of_shape(shape, 3, 2048, True, 16).build("ort:cpu", "int8")
    h, d, i = 2048, 64, 8192
    factors = 16 * shape.layers * ((h + 32 * d) + 2 * (h + 8 * d) + (32 * d + h) + 3 * (h + i))
    assert shared.weights[1].resident == 4 * factors + 4 * shape.vectors
    assert shared.weights[0] == whole.weights[0] and shared.weight_bytes < whole.weight_bytes / 2


@settings(deadline=None)
@given(st.integers(1, 10**11), st.integers(0, 8), st.integers(10**6, 10**10), st.integers(10**6, 10**10), st.integers(2, 10**5))
def test_placements_hold_what_they_say(free: int, experts: int, router: int, expert: int, context: int) -> None:
    system = a_system(experts, router, expert)
    device = a_device(free)
    memory = memory_of(system, device, context)
    rest = system.kv_bytes(context) + system.scratch_bytes(device.target) + router
    assert (memory.placement == "fits") == (rest + experts * expert <= free)
    if memory.placement == "fits with evicting experts":
        assert 1 <= memory.experts < experts
        assert rest + memory.experts * expert <= free < rest + (memory.experts + 1) * expert
    if memory.placement == "does not fit":
        assert rest + min(experts, 1) * expert > free
        assert memory.context == 0
    else:
        assert context <= memory.context
        assert memory_of(system, device, memory.context).placement == memory.placement
        assert worse(memory_of(system, device, memory.context + 1), memory)


@settings(deadline=None)
@given(st.integers(1, 10**11), st.integers(0, 10**11), st.integers(0, 6))
def test_more_memory_never_holds_less(free: int, more: int, experts: int) -> None:
    system = a_system(experts, 10**9, 2 * 10**9)
    before, after = memory_of(system, a_device(free), 4096), memory_of(system, a_device(free + more), 4096)
    assert ORDER.index(after.placement) >= ORDER.index(before.placement)
    assert after.experts >= before.experts


def worse(memory: Memory, than: Memory) -> bool:
    return (ORDER.index(memory.placement), memory.experts) < (ORDER.index(than.placement), than.experts)


def a_system(experts: int, router: int, expert: int) -> System:
    weights = (Weights(router, router, router), *[Weights(expert, expert, expert)] * experts)
    count = experts + 1
    names = tuple(str(number) for number in range(count))
    return System("int8", 8.5, names, weights, (32,) * count, (1024,) * count, 2, 32000, False)


def a_device(free: int) -> Device:
    return Device("d", "d", free + 5, 1e11, False, "tensorrt", 5, 1e10, "", "")


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 << 30), ("8GB", 8 * 10**9), ("8192 MiB", 8 << 30), ("7.5g", 7_500_000_000)])
def test_sizes_of_memory(text: str, size: int) -> None:
    assert parsed_bytes(text) == size
    assert described(text, 68).memory == size


def test_a_board_keeps_what_its_system_takes() -> None:
    board = device_named("orin-nano-8gb")
    assert board.free == board.memory - board.reserved == (8 << 30) - 2_800_000_000
