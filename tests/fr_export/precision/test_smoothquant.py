"""Smoothing changes no function, takes its scales from the paper's equation, and leaves alone what must stay."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fusionroute.calibration.observers import Observer
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.graph import Graph, Source
from fusionroute.fr_export.graphs.source_rows import rows
from fusionroute.fr_export.precision.smoothquant import (
    Choice,
    Choose,
    Columns,
    Group,
    expected_errors,
    for_blocks,
    for_tensors,
    groups,
    smooth,
    unscaled,
)  # fmt: skip
from fusionroute.fr_export.verify.torch_reference import load
from tests.support.calibration import observe, run, traced, written
from tests.support.systems import Shape, make_system

TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True}
IDS = [int(i) for i in np.random.default_rng(0).integers(3, 300, 24)]


def opened(folder: Path, shape: Shape) -> System:
    router, experts = make_system(folder, replace(shape, experts=1))
    return System.open(FAMILIES[shape.family], router, experts, max_seq_len=64)


@pytest.mark.parametrize(
    "shape",
    [
        Shape("llama3", config=TIED),
        Shape(
            "llama3", heads=6, kv_heads=2, head_dim=20, hidden=96, config=BIASED
        ),  # padded heads, rotary outside, three products for one attention
        pytest.param(Shape("llama3", heads=4, kv_heads=1, head_dim=16, config=BIASED | TIED), marks=pytest.mark.slow),
        Shape("qwen3", heads=4, kv_heads=2, config={"attention_bias": True}),
        Shape("gemma2", heads=4, kv_heads=4),
        Shape("gemma2", heads=4, kv_heads=2, head_dim=20, config=TIED | {"sliding_window": 6}),
        Shape("phi3"),  # values and up are parts of packed projections
        pytest.param(Shape("gemma3"), marks=pytest.mark.slow),
        pytest.param(Shape("smollm3"), marks=pytest.mark.slow),
    ],
    ids=["llama3", "llama3-padded-biased", "llama3-biased", "qwen3-biased", "gemma2", "gemma2-padded", "phi3", "gemma3", "smollm3"],
)
def test_a_smoothed_graph_computes_the_same(shape: Shape, tmp_path: Path) -> None:
    system = opened(tmp_path, shape)
    graph, weights = traced(system), system.router.weights
    smoothed, chosen = smooth(graph, weights, observe(graph, weights, [IDS]), partial(for_tensors, alphas=(0.5, 0.8)))
    # four groups a layer: before attention, after it, before the MLP, inside it
    assert len(groups(graph)) == 4 * shape.layers
    assert chosen.keys() == {name for name in graph.sources if "_proj.weight" in name} and None not in chosen.values()
    assert all(smoothed.sources[name].column_scale is not None for name in chosen)
    with torch.no_grad():
        model = load(system.router)
        inside = model.model(input_ids=torch.tensor([IDS]), use_cache=False).last_hidden_state[0]
        expected = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].numpy()
        routing = inside.numpy() @ system.head.weight.T + system.head.bias
    logits, scores = run(written(smoothed, weights, tmp_path, head=system.head), IDS)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(scores - routing).max() < 1e-4 * np.abs(routing).max()
    for name in ("model.model.norm.weight", "model.lm_head.weight", "model.model.embed_tokens.weight"):
        assert smoothed.sources.get(name) is graph.sources.get(name)


def test_what_no_norm_makes_is_left(tmp_path: Path) -> None:
    """OLMo 2's attention and MLP read the residual stream itself: scales move inside of them only."""
    shape = Shape("olmo2", layers=1)
    system = opened(tmp_path, shape)
    graph, weights = traced(system), system.router.weights
    smoothed, chosen = smooth(graph, weights, observe(graph, weights, [IDS]), partial(for_tensors, alphas=(0.5,)))
    assert {name.removeprefix("model.model.layers.0.") for name in chosen} == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    value_rows = smoothed.sources["model.model.layers.0.self_attn.qkv_proj.weight"].row_scale
    assert value_rows is not None and (value_rows[: -shape.kv_heads * shape.head_size] == 1).all(), "norms follow queries and keys"
    with torch.no_grad():
        expected = load(system.router)(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].numpy()
    logits, _ = run(written(smoothed, weights, tmp_path, head=system.head), IDS)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module", params=["llama3", "gemma2"])
def observed_router(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[System, Graph, dict[str, Observer]]:
    system = opened(tmp_path_factory.mktemp("system"), Shape(request.param, heads=4, kv_heads=2, head_dim=16, layers=1))
    graph = traced(system)
    return system, graph, observe(graph, system.router.weights, [IDS])


def linear_layers(system: System) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What enters each linear layer of the router [S, K], hooked in plain torch, and its weight [N, K], by name."""
    model = load(system.router)
    inputs: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0][0].numpy()}))
    with torch.no_grad():
        model(input_ids=torch.tensor([IDS]), use_cache=False)
    weight = {name: module.weight.detach().numpy() for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return inputs, weight


def test_the_scales_are_those_of_the_paper(observed_router: tuple[System, Graph, dict[str, Observer]]) -> None:
    """Against activations hooked in plain torch and weights from the checkpoint."""
    system, graph, seen = observed_router
    inputs, weight = linear_layers(system)
    smoothed, chosen = smooth(graph, system.router.weights, seen, partial(for_tensors, alphas=(0.6,)))
    assert set(chosen.values()) == {0.6}
    layer = "model.layers.0"

    def scale(x: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.asarray(x**0.6 / columns**0.4)

    down = scale(np.abs(inputs[f"{layer}.mlp.down_proj"]).max(0), np.abs(weight[f"{layer}.mlp.down_proj"]).max(0))
    column_scale = smoothed.sources[f"model.{layer}.mlp.down_proj.weight"].column_scale
    assert column_scale is not None and np.allclose(column_scale, down, rtol=1e-4)
    # two query heads share a value head, so they share its scales
    columns = np.abs(weight[f"{layer}.self_attn.o_proj"]).max(0).reshape(2, 2, 16).max(1)
    value = scale(np.abs(inputs[f"{layer}.self_attn.o_proj"]).max(0).reshape(2, 2, 16).max(1), columns)
    column_scale = smoothed.sources[f"model.{layer}.self_attn.o_proj.weight"].column_scale
    assert column_scale is not None and np.allclose(column_scale.reshape(2, 2, 16), value[:, None], rtol=1e-4)
    # gate and up read one norm: one scale for both, by the larger of their columns; up's rows were divided before
    both = np.maximum(np.abs(weight[f"{layer}.mlp.gate_proj"]).max(0), np.abs(weight[f"{layer}.mlp.up_proj"] / down[:, None]).max(0))
    for name in ("gate_proj", "up_proj"):
        column_scale = smoothed.sources[f"model.{layer}.mlp.{name}.weight"].column_scale
        assert column_scale is not None and np.allclose(column_scale, scale(np.abs(inputs[f"{layer}.mlp.{name}"]).max(0), both), rtol=1e-4)


def test_scales_for_blocks_are_those_of_usual_tokens(observed_router: tuple[System, Graph, dict[str, Observer]]) -> None:
    """Against activations hooked in plain torch and weights from the checkpoint."""
    system, graph, seen = observed_router
    inputs, weight = linear_layers(system)
    smoothed, chosen = smooth(graph, system.router.weights, seen, for_blocks)
    assert set(chosen.values()) == {0.5}
    layer = "model.layers.0"
    x = np.sqrt(np.square(inputs[f"{layer}.mlp.down_proj"]).mean(0))
    down = np.sqrt(x / np.sqrt(np.square(weight[f"{layer}.mlp.down_proj"]).sum(0)))
    column_scale = smoothed.sources[f"model.{layer}.mlp.down_proj.weight"].column_scale
    assert column_scale is not None and np.allclose(column_scale, down, rtol=1e-3)
    # two query heads share a value head, so they share its scales: those of the larger channel
    x = np.sqrt(np.square(inputs[f"{layer}.self_attn.o_proj"]).mean(0)).reshape(2, 2, 16).max(1)
    w = np.sqrt(np.square(weight[f"{layer}.self_attn.o_proj"]).sum(0)).reshape(2, 2, 16).max(1)
    column_scale = smoothed.sources[f"model.{layer}.self_attn.o_proj.weight"].column_scale
    assert column_scale is not None and np.allclose(column_scale.reshape(2, 2, 16), np.sqrt(x / w)[:, None], rtol=1e-3)
    # gate and up read one norm: one scale for both, by the columns of both; up's rows were divided before
    both = np.concatenate([weight[f"{layer}.mlp.gate_proj"], weight[f"{layer}.mlp.up_proj"] / down[:, None]])
    x = np.sqrt(np.square(inputs[f"{layer}.mlp.up_proj"]).mean(0))
    for name in ("gate_proj", "up_proj"):
        column_scale = smoothed.sources[f"model.{layer}.mlp.{name}.weight"].column_scale
        assert column_scale is not None and np.allclose(column_scale, np.sqrt(x / np.sqrt(np.square(both).sum(0))), rtol=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@settings(deadline=None, derandomize=True, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.2, 1.5), weight_spread=st.floats(0, 0.5), tail=st.floats(2, 8))
def test_scales_for_blocks_lose_less_in_products_by_block(
    folder: Path, seed: int, spread: float, weight_spread: float, tail: float
) -> None:
    """Channels and columns of uneven size, with rare large values (a t-distribution of `tail` degrees of freedom): the
    error of rounded products in blocks of 128 is less than of untouched ones, and than with the scales for tensors.
    """
    random = np.random.default_rng(seed)
    out, width, tokens = 48, 128, 400
    w = (random.standard_normal((out, width)) * np.exp(weight_spread * random.standard_normal(width))).astype(np.float32)
    x = (random.standard_t(tail, (tokens, width)) * np.exp(spread * random.standard_normal(width))).astype(np.float32)
    save_file({"w": torch.from_numpy(w)}, folder / "model.safetensors")
    weights, seen = Weights.open(folder), Observer("w", width)
    seen.see(x)
    group = Group(("w",), {}, np.arange(width))

    def rounded(values: np.ndarray) -> np.ndarray:
        step = np.abs(values).max(1, keepdims=True) / 127
        return np.asarray(np.rint(values / step) * step)

    def error(choose: Choose) -> float:
        scale = choose({"w": Source(("w",))}, weights, {"w": seen}, group).scale
        return float(np.square(rounded(x / scale) @ rounded(w * scale).T - x @ w.T).sum())

    blocks = error(for_blocks)
    assert blocks < 1.05 * error(lambda *about: unscaled(about[-1]))
    assert blocks < 1.05 * error(for_tensors)


def test_smoothed_activations_are_divided_by_the_scales(observed_router: tuple[System, Graph, dict[str, Observer]]) -> None:
    system, graph, seen = observed_router
    smoothed, chosen = smooth(graph, system.router.weights, seen, for_tensors)
    again = observe(smoothed, system.router.weights, [IDS])
    for name in chosen:
        scale = smoothed.sources[name].column_scale
        assert scale is not None and np.allclose(again[name].channel_absmax, seen[name].channel_absmax / scale, rtol=1e-3, atol=1e-5)


def test_what_was_not_seen_is_left(observed_router: tuple[System, Graph, dict[str, Observer]]) -> None:
    system, graph, seen = observed_router
    nothing = {name: Observer(name, len(observer.channel_absmax)) for name, observer in seen.items()}
    for observed in ({}, nothing):
        smoothed, chosen = smooth(graph, system.router.weights, observed, for_tensors)
        assert not chosen and smoothed.sources == graph.sources
        assert all(source.row_scale is source.column_scale is None for source in smoothed.sources.values())


def test_the_expected_error_is_that_of_rounded_products(observed_router: tuple[System, Graph, dict[str, Observer]]) -> None:
    system, graph, _ = observed_router
    weights = system.router.weights
    source = graph.sources["model.model.layers.0.mlp.up_proj.weight"]
    random = np.random.default_rng(1)
    x = (random.standard_normal((4000, 64)) * np.exp(random.standard_normal(64))).astype(np.float32)
    x[:, 5] *= 30
    seen = Observer("up", 64)
    seen.see(x)
    scales = [np.ones(64, np.float32), np.abs(x).max(0) ** 0.5, np.abs(x).max(0)]
    w = np.concatenate(list(rows(source, weights)))
    expected = []
    for scale in scales:
        step, widths = np.abs(x / scale).max() / 127, np.abs(w * scale).max(1, keepdims=True) / 127
        product = (np.rint(x / scale / step) * step) @ (np.rint(w * scale / widths) * widths).T
        expected.append(np.square(product - x @ w.T).sum() / np.square(x @ w.T).sum())
    errors = expected_errors(source, weights, Columns.read(source, weights), seen, scales)
    assert np.allclose(errors, expected, rtol=0.3), (errors, expected)
    assert errors[1] < errors[0] / 5


def test_sources_are_scaled_on_top_of_scales(observed_router: tuple[System, Graph, dict[str, Observer]]) -> None:
    """Smoothing twice is still the same function: factors multiply."""
    system, graph, seen = observed_router
    once, _ = smooth(graph, system.router.weights, seen, partial(for_tensors, alphas=(0.5,)))
    twice, _ = smooth(once, system.router.weights, observe(once, system.router.weights, [IDS]), partial(for_tensors, alphas=(0.8,)))
    name = "model.model.layers.0.mlp.down_proj.weight"
    first, second = once.sources[name].column_scale, twice.sources[name].column_scale
    assert first is not None and second is not None and not np.allclose(first, second)
    plain = np.concatenate(list(rows(Source(graph.sources[name].tensors), system.router.weights)))
    assert np.allclose(np.concatenate(list(rows(twice.sources[name], system.router.weights))), plain * second)


def test_a_model_with_a_matrix_of_an_earlier_one_takes_its_scales(tmp_path: Path) -> None:
    """A fine-tune of which only the gate was trained: up and down stay equal to the base's after smoothing by other
    statistics.
    """
    router, experts = make_system(tmp_path, Shape(experts=1, layers=1))
    tensors = load_file(Path(router) / "model.safetensors")
    gate = "model.layers.0.mlp.gate_proj.weight"
    save_file(tensors | {gate: tensors[gate] + 0.1}, Path(experts["expert0"]) / "model.safetensors", {"format": "pt"})
    system = System.open(FAMILIES["llama3"], router, experts)
    graph = traced(system)
    both = (system.router.weights, system.experts[0].weights)
    texts = (IDS, [7, 7, 250, 11, 40])
    cases: tuple[dict[str, Choice] | None, ...] = ({}, None)
    for taken in cases:
        smoothed = [
            smooth(graph, weights, observe(graph, weights, [ids]), for_tensors, taken=taken)[0]
            for weights, ids in zip(both, texts, strict=True)
        ]
        for part in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj", "self_attn.qkv_proj"):
            name = f"model.model.layers.0.{part}.weight"
            first, second = (np.concatenate(list(rows(g.sources[name], w))) for g, w in zip(smoothed, both, strict=True))
            assert np.array_equal(first, second) == (taken is not None), part


def test_groups_that_are_to_be_left(observed_router: tuple[System, Graph, dict[str, Observer]]) -> None:
    """Down projections stay as they are, and are left as well in a model that shares them; others get the scales they
    would have had.
    """
    system, graph, seen = observed_router
    down = [name for name in graph.sources if "down_proj" in name]
    taken: dict[str, Choice] = {}
    smoothed, chosen = smooth(graph, system.router.weights, seen, partial(for_tensors, alphas=(0.6,)), taken=taken, leave=down)
    assert {name: chosen[name] for name in down} == dict.fromkeys(down)
    assert all(smoothed.sources[name].column_scale is None for name in down)
    assert {alpha for name, alpha in chosen.items() if name not in down} == {0.6}
    again, _ = smooth(graph, system.router.weights, seen, partial(for_tensors, alphas=(0.6,)), taken=taken)
    for name, source in smoothed.sources.items():
        for one, other in ((source.row_scale, again.sources[name].row_scale), (source.column_scale, again.sources[name].column_scale)):
            assert (one is None) == (other is None) and (one is None or other is None or np.array_equal(one, other)), name
