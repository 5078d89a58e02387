"""A trace that leaves out layers equals one of all layers, for every family in the `ort` dialect."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs import trace as tracing
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.layer_kinds import Alike, alike, leave_out
from fusionroute.fr_export.graphs.trace import trace
from tests.support.systems import CONFIGS, Shape

LAYERS = 8  # where two kinds take turns, four of each: one of each is left out
CASES = [pytest.param(family, marks=[] if family == "gemma3" else pytest.mark.slow) for family in CONFIGS]


def written(graph: Graph) -> dict[str, list[Any]]:
    """All that a graph says, with values and nodes named by their place where their name means nothing."""
    inner = graph.model.clone().graph
    listed = list(inner.initializers.values())
    constants = {value: f"constant.{at}" for at, value in enumerate(listed) if not ("layers." in value.name or value.name in graph.sources)}
    sources = [(name, source, None if source.constant is None else source.constant.tobytes()) for name, source in graph.sources.items()]
    outputs = [(value.name, value.dtype, str(value.shape)) for value in inner.outputs]
    initializers = [
        (constants.get(value, value.name), value.dtype, str(value.shape), value.const_value and value.const_value.tobytes())
        for value in listed
    ]
    for value, name in constants.items():
        value.name = name
    nodes = []
    for at, node in enumerate(inner):
        node.name = f"node.{at}"
        for index, value in enumerate(node.outputs):
            value.name = value.name and f"value.{at}.{index}"
        results = [(value.dtype, str(value.shape)) for value in node.outputs]
        nodes.append((ir.serde.serialize_node(node).SerializeToString(deterministic=True), results))
    return {
        "inputs": [(value.name, value.dtype, str(value.shape)) for value in inner.inputs],
        "outputs": [*outputs, *(value.name for value in inner.outputs)],
        "initializers": initializers,
        "sources": sources,
        "nodes": nodes,
    }


@contextmanager
def layers_seen() -> Iterator[list[int]]:
    """How many layers each trace leaves out."""
    counts: list[int] = []

    def counted(model: Any, numbers: list[int]) -> None:
        counts.append(len(numbers))
        leave_out(model, numbers)

    with patch.object(tracing, "leave_out", counted):
        yield counts


def whole(family: str, config: Any) -> Graph:
    """The graph of a trace of all layers."""
    with patch.object(tracing, "alike", return_value=[]):
        return trace(FAMILIES[family], config, 300, 64)


@pytest.mark.parametrize("family", CASES)
def test_a_trace_of_few_layers_equals_one_of_all(family: str) -> None:
    config = Shape(family, layers=LAYERS, head_dim=20 if family == "qwen3" else 32).build(expert=False)
    with layers_seen() as left_out:
        few = written(trace(FAMILIES[family], config, 300, 64))
    # what olmo2's last layer ends with is one with the final norm: a second trace, of all layers, takes the first one's place
    assert len(left_out) == (2 if family == "olmo2" else 1) and left_out[0] >= 2
    for part, lines in written(whole(family, config)).items():
        assert few[part] == lines, part


@pytest.mark.slow
def test_layers_that_differ_in_their_number_alone_are_traced_one_by_one() -> None:
    """Nothing on such a layer tells it apart: its two traced fellows do."""
    original = LlamaDecoderLayer.forward

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        return original(self, *arguments, **named) * (1.0 + self.self_attn.layer_idx)

    config = Shape(layers=4).build(expert=False)
    with patch.object(LlamaDecoderLayer, "forward", forward), layers_seen() as left_out:
        graph = trace(FAMILIES["llama3"], config, 300, 64)
        expected = whole("llama3", config)
    assert left_out == [1, 0, 0]
    assert written(graph) == written(expected)


def test_layers_with_attributes_shapes_or_entries_of_their_own_are_of_their_own_kind() -> None:
    config = Shape(layers=9).build(expert=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert alike(model) == [Alike(1, [2, 3, 4, 5, 6, 7], 8)]
    model.model.layers[3].self_attn.scaling *= 2
    model.model.layers[8].mlp.up_proj.weight = torch.nn.Parameter(torch.empty(3, 64, device="meta"))
    assert alike(model) == [Alike(1, [2, 4, 5, 6], 7)]
    model.config.halved = [True, False] * 4 + [True]
    assert alike(model) == [Alike(2, [4], 6)], "of the others, 1, 5 and 7 alone are alike"
