"""Graphs for TensorRT that read router and expert in one pass: each text is as if its model had read it alone, in plain
torch with PEFT's adapters.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fusionroute.fr_export.verify.engine_graph_on_cpu import EnginePairOnCpu
from fusionroute.runtime.backends.mapped_factors import map_factors
from fusionroute.runtime.manifest import Manifest, Pair
from tests.fr_export.graphs.test_pair_segments import IDS, SYSTEMS
from tests.support.adapters import peft_model
from tests.support.pairs import SharedSystem, export_shared
from tests.support.parity import TOLERANCE
from tests.support.sparing import sparing

CAPACITY = 64
TARGETS = ("tensorrt", "tensorrt:10.3")
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Shared(NamedTuple):
    """A system exported with one base for both targets, and the logits [S, V] of its models for IDS, by PEFT."""

    system: SharedSystem
    logits: list[np.ndarray]

    def pair(self, target: str, precision: str = "fp32") -> Pair:
        """What the manifest says of one variant."""
        variants = Manifest.read(self.system.bundle).variants
        pair = next(each.pair for each in variants if (each.target, each.precision) == (target, precision))
        assert pair is not None
        return pair

    def open(self, target: str, number: int, precision: str = "fp32") -> EnginePairOnCpu:
        """The graph with an expert's factors."""
        pair = self.pair(target, precision)
        factors = map_factors(self.system.bundle / pair.factors[list(self.system.experts)[number]])
        return EnginePairOnCpu(self.system.bundle / pair.graph, factors)


@pytest.fixture(
    scope="module", params=sparing(SYSTEMS, ("llama3", "llama3-padded-head-rotary-outside", "qwen3", "phi3", "qwen2", "smollm3"))
)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    system = export_shared(tmp_path_factory.mktemp("pairs"), *SYSTEMS[request.param], ("fp32", *HALVES), TARGETS, CAPACITY)
    yield Shared(system, [answers(system, folder) for folder in (system.router, *system.experts.values())])


def answers(system: SharedSystem, adapter: str, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Logits [S, V] for IDS, by PEFT without merging."""
    with torch.no_grad():
        logits: np.ndarray = peft_model(system.base, Path(adapter)).to(dtype)(torch.tensor([IDS])).logits[0].float().numpy()
    return logits


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_each_text_is_as_if_its_model_had_read_it_alone(shared: Shared, target: str, data: st.DataObject) -> None:
    """Through passes of any lengths and answers, the expert behind the router or ahead of it, with keys to spare."""
    number = data.draw(st.integers(0, len(shared.logits) - 2), label="expert")
    reader = shared.open(target, number)
    texts, expected = (reader.router, reader.expert), (shared.logits[0], shared.logits[1 + number])
    while max(text.length for text in texts) < len(IDS) - 16:
        starts = [text.length for text in texts]
        counts = [data.draw(st.integers(1, 16)) for _ in texts]
        answered = [sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))) for count in counts]
        keys = [min(CAPACITY, start + count + data.draw(st.integers(0, 30))) for start, count in zip(starts, counts, strict=True)]
        pieces = [IDS[start : start + count] for start, count in zip(starts, counts, strict=True)]
        results = reader.forward(pieces[0], pieces[1], (answered[0], answered[1]), (keys[0], keys[1]))
        assert results["routing"].shape == (len(answered[0]), len(shared.system.experts))
        for name, rows, start, places in zip(("logits", "expert.logits"), expected, starts, answered, strict=True):
            bound = TOLERANCE * float(np.abs(rows).max())
            assert np.abs(results[name] - rows[[start + place for place in places]]).max() <= bound
        for text, start in zip(texts, starts, strict=True):
            if data.draw(st.booleans()):  # a rewind, a wrong guess
                text.length = data.draw(st.integers(start, text.length))


@pytest.mark.parametrize("target", TARGETS)
def test_half_precision_loses_little(shared: Shared, target: str) -> None:
    """Beside torch with the adapter in that type, whose sums are rounded as often."""
    for precision, dtype in HALVES.items():
        reader = shared.open(target, 1, precision)
        router, expert = reader.forward(IDS[:25], IDS[:7]), reader.forward(IDS[25:], IDS[7:])
        adapters = (shared.system.router, list(shared.system.experts.values())[1])
        for name, exact, adapter in zip(("logits", "expert.logits"), (shared.logits[0], shared.logits[2]), adapters, strict=True):
            rounded = answers(shared.system, adapter, dtype)
            lost = np.abs(np.concatenate([router[name], expert[name]]) - exact).mean()
            assert 0 < lost < 1.5 * np.abs(rounded - exact).mean()


@pytest.mark.parametrize("precision", ["fp32", *HALVES])
@pytest.mark.parametrize("target", TARGETS)
def test_the_signature_is_that_of_one_model_twice(shared: Shared, target: str, precision: str) -> None:
    pair = shared.pair(target, precision)
    graph = ir.load(shared.system.bundle / pair.graph).graph
    half = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
    named = {str(value.name): value for value in graph.inputs if not str(value.name).startswith("delta.")}
    router = [name for name in named if not name.startswith("expert.")]
    assert list(named) == [*router, *(f"expert.{name}" for name in router)]
    assert {named[name].dtype for name in named if "past" in name} == {half}
    outputs = {str(value.name): value for value in graph.outputs}
    assert {"logits", "routing", "expert.logits"} < outputs.keys() and "expert.routing" not in outputs
    assert {outputs[name].dtype for name in ("logits", "routing", "expert.logits")} == {ir.DataType.FLOAT}
    factors = map_factors(shared.system.bundle / pair.factors["expert0"])
    deltas = {str(value.name): value for value in graph.inputs if str(value.name).startswith("delta.")}
    assert deltas.keys() == factors.keys()
    widths = {np.dtype(np.float32): 4, np.dtype(np.float16): 2, np.dtype(np.uint16): 2}
    for name, value in deltas.items():
        assert list(value.shape) == list(factors[name].shape), "sizes are fixed"
        assert value.dtype is not None and value.dtype.itemsize == widths[factors[name].dtype]
    assert {n.domain for n in graph} == {""}


def test_all_experts_have_the_rank_of_the_largest(shared: Shared) -> None:
    """So that one engine serves them all: a multiple of 8, which tensor cores read at once."""
    pair = shared.pair("tensorrt")
    shapes = [{name: array.shape for name, array in map_factors(shared.system.bundle / path).items()} for path in pair.factors.values()]
    assert all(each == shapes[0] for each in shapes)
    assert all(shape[0] % 8 == 0 for name, shape in shapes[0].items() if name.endswith(".b"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_factor_that_is_left_out_shows(shared: Shared, target: str) -> None:
    """The comparison above sees every input of an expert."""
    number = len(shared.system.experts) - 1
    reader = shared.open(target, number)
    bound = TOLERANCE * float(np.abs(shared.logits[1 + number]).max())
    for name, factor in list(reader._factors.items()):
        if not factor.any():
            continue
        reader.router.length = reader.expert.length = 0
        reader._factors[name] = np.zeros_like(factor)
        results = reader.forward(IDS, IDS)
        reader._factors[name] = factor
        assert np.abs(results["expert.logits"] - shared.logits[1 + number]).max() > bound, name
        assert np.abs(results["logits"] - shared.logits[0]).max() <= bound, "the router has no part in it"
