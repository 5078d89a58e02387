"""Blocks of a quantised checkpoint in a bundle: bit for bit the values that the checkpoint holds."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import SCHEMES
from fusionroute.fr_export.precision.carried import Carried, carry, carrying
from fusionroute.fr_export.precision.fp32 import Fp32
from fusionroute.fr_export.precision.int4 import FORMAT as INT4
from fusionroute.fr_export.precision.int8 import FORMAT as INT8
from fusionroute.fr_export.precision.scheme import Fitting
from tests.support.calibration import fit_context, known, run, traced, written
from tests.support.packed_checkpoints import FORMS, quantise
from tests.support.systems import Shape, make_system

SHAPE = Shape(heads=2, kv_heads=1, head_dim=32, hidden=64, layers=2, experts=1)
CARRIED = {"gptq": INT4, "gptq v2": INT4, "awq": INT4, "packed": INT4, "packed, zeros": INT4, "packed, rows": INT4,
           "gptq 8": INT8, "packed 8": INT8, "int8": INT8, "int8, zeros": INT8}  # fmt: skip
IDS = np.random.default_rng(0).integers(0, SHAPE.vocab, 40).tolist()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Graph]:
    """The folder of a router, and its graph, which does not depend on how its weights are stored."""
    router, experts = make_system(tmp_path_factory.mktemp("original"), SHAPE)
    return Path(router), traced(System.open(FAMILIES["llama3"], router, experts, max_seq_len=64))


@pytest.mark.parametrize("form", FORMS)
def test_stored_blocks_are_the_values_of_the_checkpoint_bit_for_bit(form: str, original: tuple[Path, Graph], tmp_path: Path) -> None:
    folder, graph = shutil.copytree(original[0], tmp_path / "router"), original[1].clone()
    expected = quantise(folder, form)
    weights = Checkpoint.open("router", str(folder)).weights
    done: list[int] = []
    stored = {bits: carry(graph, weights, like, Store(tmp_path / str(bits)), done.append) for bits, like in ((4, INT4), (8, INT8))}
    if form not in CARRIED:
        assert stored == {4: {}, 8: {}}
        return
    bits = CARRIED[form].bits
    matrices = stored.pop(bits)
    layers = [name for name, source in graph.sources.items() if ".layers." in name and "norm" not in name and source.tensors]
    assert set(matrices) == set(layers) and stored == {12 - bits: {}}
    for name in layers:
        values = torch.cat([expected[tensor] for tensor in graph.sources[name].tensors])
        assert np.array_equal(matrices[name].widened(values.shape[1]), values.numpy()), name
    assert sum(done) == sum(expected[tensor].numel() for name in layers for tensor in graph.sources[name].tensors)
    scheme = carrying(Fp32(), matrices, graph)
    assert isinstance(scheme, Carried) and scheme.about == {"carried": len(layers)}
    ours, exact = (run(written(graph, weights, tmp_path / name, each), IDS)[0] for name, each in ((str(bits), scheme), ("exact", None)))
    assert np.abs(ours - exact).mean() < 0.03 * np.abs(exact).mean()  # activations are rounded to 8 bits within products
    size, other = sum(each.bytes for each in matrices.values()), 2 * SHAPE.vocab * SHAPE.hidden
    assert scheme.bits == pytest.approx((8 * size + 32 * other) / (sum(done) + other))


def test_calibration_rounds_only_what_is_not_carried(original: tuple[Path, Graph], tmp_path: Path) -> None:
    folder, graph = shutil.copytree(original[0], tmp_path / "router"), original[1].clone()
    quantise(folder, "gptq")
    weights = Checkpoint.open("router", str(folder)).weights
    for name, carried in (("int4", 2 * 5), ("int8", 0)):
        scheme = SCHEMES["ort:cpu"][name]
        assert isinstance(scheme, Fitting)
        fitted_graph, fitted = scheme.fit(fit_context(graph, weights, known([np.array(IDS)]), tmp_path / name))
        assert fitted.about.get("carried", 0) == carried
        run(written(fitted_graph, weights, tmp_path / name, fitted), IDS)
