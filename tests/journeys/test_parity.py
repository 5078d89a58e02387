"""Exported systems of many shapes equal plain torch, in every precision, in chunks, by token and after rewinds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.verify.torch_reference import reference
from fusionroute.runtime import FusionRuntime
from tests.support.exporting import ALL, export_system
from tests.support.parity import check_parity
from tests.support.sparing import sparing
from tests.support.systems import CONFIGS, Shape

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "original_max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1 + 0.1 * number for number in range(16)],
        "long_factor": [2 + number for number in range(16)],
    },
}
SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "sliding_window": 5}

SHAPES = {
    "llama3-gqa": Shape(),
    "llama3-rope-scaling": Shape(config={"rope_parameters": ROPE}),
    "llama3-tied": Shape(config={"tie_word_embeddings": True}, vocab=257, experts=2),
    "llama3-multi-query-fp16": Shape(heads=8, kv_heads=1, head_dim=16, experts=5, dtype=torch.float16),
    "llama3-padded-vocabulary": Shape(tokenizer=True, expert_config={"vocab_size": 320}),
    "llama3-no-gqa-one-expert": Shape(heads=3, kv_heads=3, head_dim=64, hidden=96, experts=1, vocab=131),
    "llama3-biases": Shape(config={"attention_bias": True, "mlp_bias": True}),
    "llama3-rotary-outside": Shape(head_dim=24, hidden=72),
    "llama3-padded-head": Shape(head_dim=20, hidden=60, vocab=263),
    "llama3-larger-experts": Shape(expert_config={"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3}),
    "gemma3-two-tables-above-smollm3-experts": Shape("gemma3", expert_family="smollm3", experts=1),
    "phi3-longrope-half-of-a-head-turned": Shape("phi3", heads=2, kv_heads=1, hidden=128, config=LONGROPE, expert_family="phi3", experts=1),
    "mistral-window-llama3-experts": Shape("mistral", expert_family="llama3"),
    "qwen2-biases-window-above-mistral-experts": Shape("qwen2", expert_family="mistral"),
    "olmo2-qwen3-experts": Shape("olmo2", heads=6, kv_heads=3, hidden=96, expert_family="qwen3"),
    "smollm3-two-without-rotary": Shape("smollm3", layers=4, config={"no_rope_layers": [0, 1, 1, 0]}),
    "gemma2-window": Shape("gemma2", layers=4),
    "gemma2-untied-odd": Shape("gemma2", config={"tie_word_embeddings": False, "query_pre_attn_scalar": 50}, vocab=259, head_dim=48),
    "gemma2-strong-softcaps": Shape("gemma2", config=SOFTCAPS),
    "gemma2-padded-head-bf16-shards": Shape("gemma2", head_dim=12, heads=6, kv_heads=3, hidden=72, dtype=torch.bfloat16, shard_size="50KB"),
}


# what these vary is drawn by `test_any_shape` too, or part of another shape
COVERED = (
    "olmo2-qwen3-experts",
    "llama3-gqa",
    "llama3-tied",
    "llama3-no-gqa-one-expert",
    "mistral-window-llama3-experts",
    "gemma2-untied-odd",
    "gemma2-strong-softcaps",
)


def random_ids(shape: Shape, count: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, shape.vocab, count)]


@pytest.mark.parametrize("name", sparing(SHAPES, COVERED))
def test_shapes(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    bundle, system = export_system(tmp_path, shape, ALL)
    check_parity(bundle, system, random_ids(shape, 150), prompt=90)
    check_quantised(bundle, system, random_ids(shape, 100, seed=1))


def check_quantised(bundle: Path, system: System, ids: list[int]) -> None:
    """fp16, bf16 and int8 stay near fp32, in chunks and token by token.

    Bounds are relative to the spread of the logits.
    """
    (expected,) = reference(system, [ids], (0.5, 0.5))
    for precision, bound in (("fp16", 0.003), ("bf16", 0.024), ("int8", 0.08)):
        with FusionRuntime.load(bundle, precision=precision) as runtime:
            for chunk in (512, 1):
                scores = runtime.score(ids, chunk=chunk)
                same = scores.experts == expected.experts
                assert same.mean() >= 0.9
                gap = np.abs(scores.logits - expected.logits)[same].mean() / expected.logits.std()
                print(f"{precision}, chunks of {chunk}: mean difference {gap:.2g} of the spread")
                assert gap <= bound


WINDOWS, BOOLEANS = st.integers(1, 40), st.booleans()
QWEN: dict[str, st.SearchStrategy[object]] = {
    "use_sliding_window": BOOLEANS,
    "sliding_window": WINDOWS,
    "max_window_layers": st.integers(0, 3),
}
# family → what is drawn for its config, beside sizes
FIELDS: dict[str, dict[str, st.SearchStrategy[object]]] = {
    "gemma2": {"sliding_window": WINDOWS},
    "gemma3": {"sliding_window": WINDOWS},
    "llama3": {"attention_bias": BOOLEANS, "mlp_bias": BOOLEANS},
    "mistral": {"sliding_window": st.none() | WINDOWS},
    "olmo2": {"attention_bias": BOOLEANS},
    "phi3": {"sliding_window": st.none() | WINDOWS},
    "qwen2": QWEN,
    "qwen3": QWEN | {"attention_bias": BOOLEANS},
    "smollm3": {"no_rope_layer_interval": st.integers(1, 3), "attention_bias": BOOLEANS, "mlp_bias": BOOLEANS},
}


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Any shape that the families allow, with experts of the router's family or of another."""
    family, expert_family = draw(st.sampled_from(sorted(FIELDS))), draw(st.sampled_from(sorted(FIELDS)))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 4))
    tied = {"tie_word_embeddings": BOOLEANS}
    return Shape(
        family,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(2, 32)),
        hidden=heads * 2 * draw(st.integers(4, 12)),  # transformers wants a multiple, and families without head_dim an even one
        vocab=draw(st.integers(50, 400)),
        experts=draw(st.integers(1, 5)),
        layers=draw(st.integers(1, 3)),
        config=draw(st.fixed_dictionaries(FIELDS[family] | tied)),
        expert_config=draw(st.fixed_dictionaries(FIELDS[expert_family] | tied)),
        expert_family=expert_family,
    )


def test_every_family_is_drawn() -> None:
    assert FIELDS.keys() == CONFIGS.keys() == FAMILIES.keys()


def check_any_shape(shape: Shape, tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle, system = export_system(tmp_path_factory.mktemp("system"), shape, ("fp32",))
    check_parity(bundle, system, random_ids(shape, 150), prompt=90)


FEW = settings(max_examples=3, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@FEW
@given(shape=shapes())
def test_any_shape(shape: Shape, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_any_shape(shape, tmp_path_factory)


@pytest.mark.slow
@settings(FEW, max_examples=60, derandomize=False)
@given(shape=shapes())
def test_any_shape_many(shape: Shape, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_any_shape(shape, tmp_path_factory)
