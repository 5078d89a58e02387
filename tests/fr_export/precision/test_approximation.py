"""Low-rank factors of a full fine-tune: the least error that their rank allows, on what torch says the inputs are."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.fr_export.checkpoints.deltas import delta_of
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.checkpoints.torch_model import torch_model
from fusionroute.fr_export.graphs.decoder_blocks import reader
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.precision.approximation import Change, ChangedExpert, approximate, spectra
from fusionroute.fr_export.precision.gptq import DAMPING, Hessian
from tests.support.calibration import traced
from tests.support.systems import Shape, make_system

SHAPE = Shape("llama3", heads=2, kv_heads=1, head_dim=16, hidden=32, layers=1, experts=1)
TEXTS = [np.random.default_rng(n).integers(3, 300, 90, dtype=np.int32) for n in range(3)]
# a matrix of the graph, and the tensors that it is made of
MATRICES = {
    "model.model.layers.0.self_attn.qkv_proj.weight": [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"],
    "model.model.layers.0.self_attn.o_proj.weight": ["model.layers.0.self_attn.o_proj.weight"],
    "model.model.layers.0.mlp.gate_proj.weight": ["model.layers.0.mlp.gate_proj.weight"],
    "model.model.layers.0.mlp.up_proj.weight": ["model.layers.0.mlp.up_proj.weight"],
    "model.model.layers.0.mlp.down_proj.weight": ["model.layers.0.mlp.down_proj.weight"],
    "model.lm_head.weight": ["lm_head.weight"],
}
EMBEDDING = "model.model.embed_tokens.weight.lookup"
Expected = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    router, experts = make_system(tmp_path_factory.mktemp("system"), SHAPE)
    return System.open(None, router, experts)


@pytest.fixture(scope="module")
def expected(system: System) -> Iterator[Expected]:
    """Matrix → what it changed by [N, K], the expert's, and the damped second moment of its inputs [K, K], in fp64."""
    expert, router = torch_model(system.experts[0]), torch_model(system.router).state_dict()
    seen: dict[str, list[torch.Tensor]] = {}
    for tensors in MATRICES.values():
        name = tensors[0].removesuffix(".weight")
        expert.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0][0]))
    with torch.no_grad():
        for ids in TEXTS:
            expert(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False)
    results = {}
    for matrix, tensors in MATRICES.items():
        x = torch.cat(seen[tensors[0].removesuffix(".weight")]).double().numpy()
        own, base = (torch.cat([weights[name] for name in tensors]).double().numpy() for weights in (expert.state_dict(), router))
        results[matrix] = own - base, own, damped(x.T @ x)
    own, base = (weights["model.embed_tokens.weight"].double().numpy().T for weights in (expert.state_dict(), router))
    results[EMBEDDING] = own - base, own, damped(np.diag(np.bincount(np.concatenate(TEXTS), minlength=300).astype(float)))
    yield results


def damped(moment: np.ndarray) -> np.ndarray:
    result: np.ndarray = moment + DAMPING * np.diag(moment).mean() * np.eye(len(moment))
    return result


@pytest.fixture(scope="module")
def graph(system: System) -> Graph:
    return traced(system)


def changed(system: System, graph: Graph, texts: list[np.ndarray]) -> ChangedExpert:
    delta = delta_of(system.router, system.experts[0], approximate=True)
    return ChangedExpert.of(graph, system.experts[0].weights, texts, delta)


@pytest.mark.parametrize("texts", [TEXTS, []], ids=["calibrated", "weights-alone"])
def test_no_factors_of_their_rank_have_a_smaller_error(texts: list[np.ndarray], system: System, graph: Graph, expected: Expected) -> None:
    """The least squared error of rank r is the sum of all but the r largest eigenvalues of D·H·Dᵀ (Eckart, Young)."""
    base = reader(graph, system.router.weights)[1]
    for rank in (1, 7, 24, 32):
        factors = approximate(changed(system, graph, texts), base, dict.fromkeys(expected, rank), lambda _: None)
        assert factors.keys() == expected.keys()
        for name, (difference, _, moment) in expected.items():
            moment = moment if texts else np.eye(len(moment))
            error = difference - (factors[name].a.astype(np.float64) @ factors[name].b).T
            eigenvalues = np.linalg.eigvalsh(difference @ moment @ difference.T)
            least = eigenvalues[: max(0, len(eigenvalues) - rank)].clip(0).sum()
            assert np.trace(error @ moment @ error.T) == pytest.approx(least, rel=5e-3, abs=1e-8 * eigenvalues.sum()), name


def test_spectra_are_shares_of_the_products(system: System, graph: Graph, expected: Expected) -> None:
    base = reader(graph, system.router.weights)[1]
    every = {each.names: each for each in spectra(changed(system, graph, TEXTS), base, lambda _: None)}
    gate_and_up = tuple(name for name in expected if "gate" in name or "up_proj" in name)
    assert set(every) == {gate_and_up, *((name,) for name in expected if name not in gate_and_up)}
    for names, spectrum in every.items():
        total = 0.0
        for name in names:
            difference, whole, moment = expected[name]
            total += np.trace(difference @ moment @ difference.T) / np.trace(whole @ moment @ whole.T)
        assert spectrum.gains.sum() == pytest.approx(total, rel=5e-3)
        assert (np.diff(spectrum.gains) <= 1e-12).all()
        assert spectrum.values == sum(sum(expected[name][0].shape) for name in names)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_directions_of_full_rank_give_any_change_back(rows: int, columns: int, seed: int) -> None:
    """However few inputs weigh its columns."""
    generator = torch.Generator().manual_seed(seed)
    difference = torch.randn(rows, columns, generator=generator)
    inputs = Hessian(columns)
    inputs.see(torch.randn(3, columns, generator=generator).numpy())
    root = inputs.root()
    left = torch.linalg.svd(Change({}, {}, root).weighted(difference), full_matrices=False)[0]
    assert torch.allclose(left @ (left.T @ difference), difference, atol=1e-4)
