"""Graphs in which every expert has a segment: each reads as plain torch does, whoever else reads in the pass."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fr_export.graphs.test_pair_segments import IDS, SMALL
from tests.support.adapters import TARGETS
from tests.support.pairs import SharedSystem, export_shared, peft_logits
from tests.support.parity import TOLERANCE
from tests.support.segments import SegmentReader
from tests.support.sparing import sparing
from tests.support.systems import Shape

# the router, then the experts: some matrices or all of them, other ranks
SYSTEMS: dict[str, tuple[Shape, list[dict[str, Any]]]] = {
    "llama3-rotary-outside": (
        Shape("llama3", head_dim=20, **SMALL),
        [{"target_modules": TARGETS[:4]}, {"r": 3, "rank_pattern": {"q_proj": 5}}, {"target_modules": ["down_proj"]}, {"r": 2}],
    ),
    "gemma2-five": (Shape("gemma2", head_dim=16, **SMALL), [{"r": 2}, *({"r": rank} for rank in (1, 2, 3, 4, 8))]),
    "llama3": (Shape("llama3", head_dim=16, **SMALL), [{}, {"r": 7}, {"target_modules": ["v_proj", "up_proj"]}]),
    "qwen3": (Shape("qwen3", head_dim=16, **SMALL), [{"r": 1}, {"r": 5}, {"r": 2}, {"r": 3}, {"r": 4}]),
    "phi3": (
        Shape("phi3", **SMALL),
        [{"target_modules": ["qkv_proj"]}, *({"target_modules": ["gate_up_proj", "down_proj"], "r": r} for r in (1, 4))],
    ),
}


@pytest.fixture(scope="module", params=sparing(SYSTEMS, ("llama3", "qwen3", "phi3")))
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SharedSystem, list[np.ndarray]]:
    """A shared system in fp32, and the logits [S, V] of its models for IDS, by PEFT without merging."""
    system = export_shared(tmp_path_factory.mktemp(request.param), *SYSTEMS[request.param])
    return system, peft_logits(system, IDS)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_each_segment_is_as_if_its_model_had_read_it_alone(shared: tuple[SharedSystem, list[np.ndarray]], data: st.DataObject) -> None:
    """Through passes in which any of the models read, each as many tokens as it likes."""
    system, expected = shared
    reader = SegmentReader(system.bundle, "fp32")
    for _ in range(4):
        starts = [memory.length for memory in reader.memories]
        counts = [min(data.draw(st.sampled_from([0, 0, 1, 1, 2, 5, 9])), len(IDS) - start) for start in starts]
        if not any(counts):
            continue
        before = [{name: buffer.copy() for name, buffer in memory.buffers.items()} for memory in reader.memories]
        logits, routing = reader.read([IDS[start : start + count] for start, count in zip(starts, counts, strict=True)])
        assert len(routing) == counts[0]
        for number, (start, count, own) in enumerate(zip(starts, counts, logits, strict=True)):
            reference = expected[number][start : start + count]
            assert own.shape == reference.shape and np.abs(own - reference).max(initial=0) <= TOLERANCE * np.abs(expected[number]).max()
            if not count:
                assert all(np.array_equal(buffer, before[number][name]) for name, buffer in reader.memories[number].buffers.items())


def test_models_differ(shared: tuple[SharedSystem, list[np.ndarray]]) -> None:
    """The comparison above would see factors of another expert."""
    _, logits = shared
    for number, own in enumerate(logits):
        for other in logits[:number]:
            assert np.abs(own - other).max() > 100 * TOLERANCE * np.abs(own).max()


def test_operators_stand_there_once_for_all_or_once_for_each_expert(shared: tuple[SharedSystem, list[np.ndarray]]) -> None:
    """The base's products serve everybody; attention is in a branch for each model."""
    system, logits = shared
    graph = ir.load(system.bundle / "graphs/base.ort-cpu.fp32.onnx").graph
    count = len(logits)
    branches = [each for each in graph if each.op_type == "If"]
    assert len(branches) == count * SMALL["layers"] and not [each for each in graph if each.op_type == "GroupQueryAttention"]
    for each in branches:
        assert [n.op_type for n in each.attributes["then_branch"].as_graph()] == ["GroupQueryAttention"]
    factors = [str(value.name) for value in graph.inputs if ".delta." in str(value.name)]
    assert len({name.split(".", 1)[1] for name in factors}) * (count - 1) == len(factors)
    products = [each for each in graph if each.op_type == "FusedMatMul" and str(each.inputs[1].name).endswith("_proj.weight")]
    assert len({str(each.inputs[1].name) for each in products}) == len(products) > 0


@pytest.mark.parametrize("options", [[{}, {}], [{}, {}, {"modules_to_save": ["norm"]}]], ids=["one expert", "norms"])
def test_systems_that_keep_a_graph_for_two(options: list[dict[str, Any]], tmp_path: Path) -> None:
    system = export_shared(tmp_path, Shape("llama3", head_dim=16, **SMALL | {"layers": 1}), options)
    (variant,) = json_of(system.bundle)["variants"]
    assert not variant["pair"].get("every_expert")


def json_of(bundle: Path) -> Any:
    return json.loads((bundle / "manifest.json").read_text())
