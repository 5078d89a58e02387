"""The trace: one per architecture, no weights in memory, and the graph passes did their work."""

import errno
from collections import Counter
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from rich.console import Console
from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig, MambaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.dialects import ort
from fusionroute.fr_export.graphs.trace import trace
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.runtime.bench.memory import PeakMemory
from fusionroute.runtime.errors import FusionError
from tests.support.systems import Shape, make_system


def operators(shape: Shape) -> Counter[str]:
    graph = trace(FAMILIES[shape.family], shape.build(expert=False), shape.vocab, 64)
    return Counter(node.op_type for node in graph.model.graph)


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_passes_leave_only_what_pays(family: str) -> None:
    layers = 3
    counts = operators(Shape(family, layers=layers, config={"tie_word_embeddings": True}))
    assert counts["GroupQueryAttention"] == layers
    assert counts["FusedMatMul"] == 5 * layers + 1, "packed QKV, output, gate, up, down; and the head"
    norms_per_layer = 4 if family == "gemma2" else 2
    assert counts["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert counts["SimplifiedLayerNormalization"] == (norms_per_layer - 2) * layers + 1
    assert counts["Reshape"] == 0
    assert counts["Transpose"] <= 2, "only the selection of logit positions may transpose"


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_biases_and_norms_do_not_keep_projections_apart(family: str) -> None:
    """Attention reads Qwen 2's packed sum as it is, and the parts of Qwen 3's where norms lie between."""
    biased = {"attention_bias": True} if family == "qwen3" else {}
    counts = operators(Shape(family, layers=1, config=biased))
    assert counts["FusedMatMul"] == 5 + 1 and counts["Add"] == 1 + len(biased), "one bias for all three, and the output's"
    assert counts["Split"] == (family == "qwen3")


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
    with PeakMemory() as memory:
        graph = trace(FAMILIES["gemma2"], config, config.vocab_size, 64)
    assert graph.parameters > 1.2e9
    assert memory.growth.anonymous < 300 * 2**20


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
UNSERVED: dict[str, tuple[Any, str]] = {
    "gpt2": (GPT2Config(vocab_size=64), "'num_key_value_heads' in its config"),
    "mamba": (MambaConfig(vocab_size=64), "'num_attention_heads' in its config"),
    "gptneox": (GPTNeoXConfig(**SMALL, num_key_value_heads=2), "rotary embeddings at 'model.rotary_emb'"),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_a_family_that_the_tracer_cannot_serve_is_refused_by_what_it_lacks(name: str) -> None:
    """These ended in TypeError and AttributeError."""
    config, lack = UNSERVED[name]
    family = replace(FAMILIES["llama3"], name=name)
    with pytest.raises(FusionError, match=rf"^The family {name} cannot be traced, since it lacks {lack}: only decoders .*\.$"):
        trace(family, config, 64, 64)


def test_a_rotary_embedding_of_more_than_positions_and_layers_is_refused() -> None:
    def forward(self: Any, x: Any, position_ids: Any, seq_len: int) -> None: ...

    config = LlamaConfig(**SMALL, num_key_value_heads=1, intermediate_size=64)
    with (
        patch.object(LlamaRotaryEmbedding, "forward", forward),
        pytest.raises(FusionError, match=r"rotary tables by position and kind of layer \(its own also depend on seq_len\): only decoders"),
    ):
        trace(FAMILIES["llama3"], config, 64, 64)


def test_every_layer_has_the_rotary_that_its_model_applies_there() -> None:
    """None in two of SmolLM3's; of the others one table."""
    shape = Shape("smollm3", layers=4, config={"no_rope_layers": [0, 1, 1, 0]})
    graph = trace(FAMILIES["smollm3"], shape.build(expert=False), shape.vocab, 64).model.graph
    attentions = [node for node in graph if node.op_type == "GroupQueryAttention"]
    tables = [[value.name for value in node.inputs[7:]] for node in attentions]
    turned = ["model.model.rotary_emb.cos", "model.model.rotary_emb.sin"]
    assert tables == [[], turned, turned, []]
    assert [node.attributes.get_int("do_rotary", 0) for node in attentions] == [0, 1, 1, 0]


@pytest.mark.parametrize(
    "text", ["no decomposition\nof grouped_mm", "no decomposition of grouped_mm. \x1b[96mNext steps\x1b[0m:\n* report it"]
)
def test_what_torch_cannot_express_is_told_in_one_sentence(text: str) -> None:
    config = LlamaConfig(**SMALL, num_key_value_heads=1, intermediate_size=64)
    with (
        patch("torch.onnx.export", side_effect=RuntimeError(text)),
        pytest.raises(FusionError, match=r"^The family llama3 cannot be traced: no decomposition of grouped_mm$"),
    ):
        trace(FAMILIES["llama3"], config, 64, 64)


def stopped_by(error: Exception) -> Any:
    """The model raises this while torch traces it; torch wraps it in an error of its own."""

    @wraps(ort.Forward.forward)
    def forward(*_: Any, **__: Any) -> None:
        raise error

    return patch.object(ort.Forward, "forward", forward)


def test_what_stopped_torch_is_told_and_not_torchs_own_words() -> None:
    config = LlamaConfig(**SMALL, num_key_value_heads=1, intermediate_size=64)
    with (
        stopped_by(RuntimeError("no such kernel")),
        pytest.raises(FusionError, match=r"^The family llama3 cannot be traced: no such kernel$"),
    ):
        trace(FAMILIES["llama3"], config, 64, 64)


MACHINE = [MemoryError(), OSError(errno.ENOSPC, "No space left on device"), ModuleNotFoundError("No module", name="onnxscript")]


@pytest.mark.parametrize("error", MACHINE, ids=lambda error: type(error).__name__)
def test_a_fault_of_the_machine_is_not_blamed_on_the_family(error: Exception) -> None:
    config = LlamaConfig(**SMALL, num_key_value_heads=1, intermediate_size=64)
    for fault in (patch("torch.onnx.export", side_effect=error), stopped_by(error)):
        with fault, pytest.raises(type(error)) as raised:
            trace(FAMILIES["llama3"], config, 64, 64)
        assert raised.value is error
