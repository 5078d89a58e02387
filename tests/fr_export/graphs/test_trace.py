"""The trace: one per architecture, no weights in memory, and the graph passes did their work."""

from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
from rich.console import Console
from transformers import Gemma2Config

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import PeakMemory, Stages, anonymous_bytes
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.trace import trace
from fusionroute.fr_export.graphs.traces import Traces
from tests.support.systems import Shape, make_system


def operators(shape: Shape) -> Counter[str]:
    graph = trace(FAMILIES[shape.family], shape.build(expert=False), shape.vocab, 64)
    return Counter(node.op_type for node in graph.model.graph)


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_passes_leave_only_what_pays(family: str) -> None:
    layers = 3
    found = operators(Shape(family, layers=layers, config={"tie_word_embeddings": True}))
    assert found["GroupQueryAttention"] == layers
    assert found["FusedMatMul"] == 5 * layers + 1, "packed QKV, output, gate, up, down; and the head"
    norms_per_layer = 4 if family == "gemma2" else 2
    assert found["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert found["SimplifiedLayerNormalization"] == (norms_per_layer - 2) * layers + 1
    assert found["Reshape"] == 0
    assert found["Transpose"] <= 2, "only the selection of logit positions may transpose"


def test_one_trace_serves_all_models_of_one_architecture(tmp_path: Path) -> None:
    shape = Shape(experts=3, expert_config={"num_hidden_layers": 1})
    system = System.open(FAMILIES["llama3"], *make_system(tmp_path, shape))
    with patch("fusionroute.fr_export.graphs.traces.trace", wraps=trace) as counted:
        graphs = Traces(system, Stages(Console(quiet=True))).of()
    assert counted.call_count == 2
    assert graphs["expert0"] is graphs["expert1"] is graphs["expert2"]
    assert graphs["router"].layers == 2 and graphs["expert0"].layers == 1


def test_tracing_holds_no_weights() -> None:
    """1.4 billion parameters, 5.6 GB in fp32, must not show in the memory."""
    config = Gemma2Config(vocab_size=256_000, hidden_size=4096, intermediate_size=16384, num_hidden_layers=1, head_dim=256)
    trace(FAMILIES["gemma2"], Shape("gemma2").build(expert=False), 300, 64)  # imports and caches come first
    before = anonymous_bytes()
    with PeakMemory() as memory:
        graph = trace(FAMILIES["gemma2"], config, config.vocab_size, 64)
    assert graph.parameters > 1.2e9
    assert memory.peak - before < 300 * 2**20
