"""W8A8 graphs against plain torch whose weights and inputs are rounded, and what the plan promises."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fusionroute.calibration.blockwise_forward import BlockwiseForward
from fusionroute.calibration.observers import Observer
from fusionroute.calibration.record import Text
from fusionroute.calibration.serving_masks import Mask
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.decoder_blocks import reader, split
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.source_rows import rows
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import SMALLEST_NORMAL, Stored
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.plan_w8a8 import W8A8Plan, choose, logit_noise, matrices
from fusionroute.fr_export.precision.smoothquant import Columns, smooth
from fusionroute.fr_export.precision.w8a8 import PlannedW8A8, StaticW8A8, quantise
from fusionroute.fr_export.verify.torch_reference import load
from fusionroute.runtime.errors import InputError
from tests.support.calibration import fit_context, observe, run, traced, written
from tests.support.systems import Shape, make_system

IDS = [int(i) for i in np.random.default_rng(0).integers(3, 300, 32)]
SHAPES = {
    "llama3": Shape("llama3", experts=1, config={"tie_word_embeddings": True}),
    "llama3-biased": Shape("llama3", experts=1, head_dim=20, config={"attention_bias": True, "mlp_bias": True}),
    "gemma2": Shape("gemma2", experts=1, config={"tie_word_embeddings": True}),
}


class PlannedRouter(NamedTuple):
    system: System
    graph: Graph
    seen: dict[str, Observer]
    noise: dict[str, float]
    plan: W8A8Plan
    path: Path
    written: ir.Graph


def uneven(graph: Graph) -> dict[str, float]:
    """A noise for every product, of which some are much louder than others."""
    random = np.random.default_rng(3)
    return {name: float(np.exp(3 * random.standard_normal())) * 1e-6 for name in matrices(graph)}


@pytest.fixture(scope="module", params=SHAPES)
def planned_router(request: Any, tmp_path_factory: pytest.TempPathFactory) -> PlannedRouter:
    """A smoothed router, planned and written."""
    folder, shape = tmp_path_factory.mktemp("system"), SHAPES[request.param]
    router, experts = make_system(folder, shape)
    system = System.open(FAMILIES[shape.family], router, experts, max_seq_len=64)
    graph, weights = traced(system), system.router.weights
    graph, _ = smooth(graph, weights, observe(graph, weights, [IDS]))
    seen = observe(graph, weights, [IDS])
    noise = uneven(graph)
    chosen = choose(graph, weights, seen, noise)
    path = written(graph, weights, folder / "out", PlannedW8A8(chosen), system.head)
    return PlannedRouter(system, graph, seen, noise, chosen, path, ir.load(path).graph)


def rounded(array: np.ndarray) -> np.ndarray:
    """8 bits with one scale per row, in plain numpy."""
    step = np.abs(array).max(1, keepdims=True) / np.float32(127)
    return np.asarray(np.rint(array / step) * step, np.float32)


@torch.no_grad()
def simulated(planned_router: PlannedRouter) -> tuple[np.ndarray, np.ndarray]:
    """Logits [S, V] and routing scores of torch's own model with smoothed, rounded weights and rounded inputs."""
    model = load(planned_router.system.router)
    checkpoint = {name: parameter.clone().numpy() for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters())
    planned: dict[str, str] = {}
    for name, source in planned_router.graph.sources.items():
        start = 0
        for tensor in source.tensors:
            planned[tensor] = name
            part = checkpoint[tensor] + np.float32(source.offset)
            rows = slice(start, start + len(part))
            start += len(part)
            if source.row_scale is not None:
                part = part * (source.row_scale[rows, None] if part.ndim == 2 else source.row_scale[rows])
            if source.column_scale is not None:
                part = part * source.column_scale
            if part.ndim == 2:
                part = rounded(part)
            parameters[tensor].copy_(torch.from_numpy(part - np.float32(source.offset)))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            tied = name == "lm_head" and planned_router.system.router.config.tie_word_embeddings
            step = planned_router.plan.scales.get(planned["model.embed_tokens.weight" if tied else f"{name}.weight"])
            if step is not None:
                module.register_forward_pre_hook(lambda _, args, step=step: ((args[0] / step).round().clamp(-128, 127) * step,))
    ids = torch.tensor([IDS])
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0].numpy()
    routing = hidden @ planned_router.system.head.weight.T + planned_router.system.head.bias
    return model(input_ids=ids, use_cache=False).logits[0].numpy(), routing


def test_a_graph_computes_what_torch_computes_with_rounded_values(planned_router: PlannedRouter) -> None:
    expected, expected_routing = simulated(planned_router)
    logits, routing = run(planned_router.path, IDS)
    exact, _ = run(
        written(
            planned_router.graph,
            planned_router.system.router.weights,
            planned_router.path.parent / "exact",
            head=planned_router.system.head,
        ),
        IDS,
    )
    lost = np.abs(expected - exact).mean()
    # where a value lies between two steps, another order of sums may round it to the other: rare, and as small as a
    # step
    assert np.abs(logits - expected).mean() < 0.1 * lost
    assert np.abs(routing - expected_routing).mean() < 0.01 * np.abs(expected_routing).mean()
    assert np.median(np.abs(logits - expected)) < 1e-3 * lost or np.abs(logits - expected).mean() < 0.02 * lost


def test_the_graph_is_what_the_plan_says(planned_router: PlannedRouter) -> None:
    """Every product is a MatMul of int8 weights scaled by row; those planned, and no others, round their input about
    zero.
    """
    products = [n for n in planned_router.written if n.op_type == "MatMul"]
    # the routing head
    assert [n.op_type for n in planned_router.written if n.op_type == "FusedMatMul"] == ["FusedMatMul"]
    shapes = {
        name: shape
        for name, shape in matrices(planned_router.graph).items()
        if any(name == n.inputs[1].name[: -len(".turned")] for n in products)
    }
    assert len(products) == len(shapes)
    work = {True: 0, False: 0}
    for product in products:
        name = product.inputs[1].name.removesuffix(".turned")
        dequantise = product.inputs[1].producer().inputs[0].producer()
        values, scales = (value.const_value.numpy() for value in dequantise.inputs)
        assert dequantise.op_type == "DequantizeLinear" and dequantise.attributes["axis"].as_int() == 0
        assert values.dtype == np.int8 and values.min() >= -127 and scales.shape == (len(values),) and (scales > 0).all()
        assert values.shape == shapes[name]
        restored = product.inputs[0].producer()
        planned = restored is not None and restored.op_type == "DequantizeLinear"
        assert planned == (name in planned_router.plan.scales)
        work[planned] += values.size
        if planned:
            quantised = restored.inputs[0].producer()
            assert quantised.op_type == "QuantizeLinear"
            for node in (quantised, restored):
                scale, zero = (value.const_value.numpy() for value in node.inputs[1:])
                assert scale.shape == zero.shape == () and zero.dtype == np.int8 and zero == 0
                assert scale == np.float32(planned_router.plan.scales[name])
    share = work[True] / (work[True] + work[False])
    assert share == pytest.approx(planned_router.plan.share) and share >= 0.6
    assert {product.matrix for product in planned_router.plan.at_a16} == shapes.keys() - planned_router.plan.scales.keys()
    for product in planned_router.plan.at_a16:
        assert product.work == np.prod(shapes[product.matrix])


def test_products_of_one_input_share_its_rounding(planned_router: PlannedRouter) -> None:
    inputs = [n.inputs[0].name for n in planned_router.written if n.op_type == "QuantizeLinear"]
    assert len(inputs) == len(set(inputs))


def test_every_weight_is_stored_once_under_its_hash(planned_router: PlannedRouter) -> None:
    stored: dict[str, set[str]] = {}
    for name, value in planned_router.written.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            stored.setdefault(str(value.const_value.location), set()).add(name)
    folder = planned_router.path.parent
    assert {f"weights/{path.name}" for path in (folder / "weights").iterdir()} == stored.keys()
    for location in stored:
        assert hashlib.sha256((folder / location).read_bytes()).hexdigest() == Path(location).stem
    shapes = matrices(planned_router.graph)
    values = sum(out * width for out, width in shapes.values())
    mine = [location for location, names in stored.items() if any(name.rsplit(".", 1)[0] in shapes for name in names)]
    assert sum((folder / location).stat().st_size for location in mine) * 8 == pytest.approx(planned_router.plan.bits * values)
    # the head's product and the look-up read one initialiser
    if planned_router.system.router.config.tie_word_embeddings:
        lookup = next(n for n in planned_router.written if n.op_type == "Gather" and n.inputs[0].dtype == ir.DataType.INT8)
        assert {n.op_type for n in lookup.inputs[0].consumers()} == {"Gather", "DequantizeLinear"}


def test_the_noisiest_products_stay_at_16_bit_activations(planned_router: PlannedRouter) -> None:
    weights, at_a16 = planned_router.system.router.weights, planned_router.plan.at_a16
    assert at_a16 and [p.noise / p.work for p in at_a16] == sorted((p.noise / p.work for p in at_a16), reverse=True)
    everything = choose(planned_router.graph, weights, planned_router.seen, planned_router.noise, share=1)
    assert not everything.at_a16 and everything.share == 1 and everything.scales.items() >= planned_router.plan.scales.items()
    nothing = choose(planned_router.graph, weights, planned_router.seen, planned_router.noise, share=0)
    assert not nothing.scales and nothing.share == 0
    assert {p.matrix: p.noise for p in nothing.at_a16 if "layers" in p.matrix}.items() <= planned_router.noise.items()
    # those that did not fit, or that come after the last that did
    spared = [p for p in nothing.at_a16 if p not in at_a16]
    assert all(p.work > (planned_router.plan.share - 0.6) * sum(q.work for q in nothing.at_a16) for p in spared)
    assert all(step == pytest.approx(planned_router.seen[name].absmax() / 127) for name, step in everything.scales.items())
    clipped = choose(planned_router.graph, weights, planned_router.seen, planned_router.noise, Observer.mse, share=1)
    assert all(step == pytest.approx(planned_router.seen[name].mse() / 127) for name, step in clipped.scales.items())
    assert clipped.scales != everything.scales


def test_what_calibration_never_saw_stays_at_16_bit_activations(planned_router: PlannedRouter) -> None:
    weights, name = planned_router.system.router.weights, "model.model.layers.0.mlp.down_proj.weight"
    unseen = planned_router.seen | {name: Observer(name, 128)}
    unseen_plan = choose(planned_router.graph, weights, unseen, planned_router.noise, share=1)
    assert [p.matrix for p in unseen_plan.at_a16] == [name] and unseen_plan.at_a16[0].noise == np.inf
    with pytest.raises(InputError, match=f"no statistics of '{name}'"):
        choose(
            planned_router.graph, weights, {key: value for key, value in planned_router.seen.items() if key != name}, planned_router.noise
        )


def test_the_noise_of_logits_is_that_of_rounded_inputs() -> None:
    random = np.random.default_rng(1)
    x = (random.standard_normal((4000, 48)) * np.exp(random.standard_normal(48))).astype(np.float32)
    w = random.standard_normal((30, 48)).astype(np.float32)
    seen = Observer("x", 48)
    seen.see(x)
    columns = Columns(np.abs(w).max(0), np.square(w, dtype=np.float64).sum(0))
    for limit in (seen.absmax(), seen.mse(), seen.percentile(99)):
        step = limit / 127
        off = (np.clip(np.rint(x / step), -127, 127) * step - x) @ w.T
        assert logit_noise(seen, limit, columns) == pytest.approx(np.square(off).sum(-1).mean(), rel=0.35)
    assert logit_noise(seen, 0.0, columns) == 0


ROWS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 40)), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
)


@settings(deadline=None, derandomize=True)
@given(ROWS)
def test_rows_are_rounded_to_nearest(weights: np.ndarray) -> None:
    values, scales = quantise(weights)
    assert values.dtype == np.int8 and scales.dtype == np.float32 and (scales > 0).all() and np.abs(values.astype(int)).max() <= 127
    exact = weights.astype(np.float64)
    assert (np.abs(values * scales[:, None].astype(np.float64) - exact).max(1) <= scales * 0.5001 + 127 * SMALLEST_NORMAL).all()
    largest = np.abs(exact).max(1)
    used = largest > 127 * SMALLEST_NORMAL
    assert np.allclose(scales[used], largest[used] / 127)


def test_an_embedding_apart_from_the_head_is_read_by_rows(tmp_path: Path) -> None:
    """The look-up alone: a row of the embedding, rounded."""
    router, experts = make_system(tmp_path, replace(SHAPES["llama3-biased"], layers=1))
    system = System.open(FAMILIES["llama3"], router, experts, max_seq_len=64)
    graph, weights = traced(system), system.router.weights
    path = written(graph, weights, tmp_path / "out", PlannedW8A8(choose(graph, weights, observe(graph, weights, [IDS]), uneven(graph))))
    model = ir.load(path)
    norm = next(n for n in model.graph if n.op_type == "SimplifiedLayerNormalization")
    model.graph.outputs[:] = [norm.inputs[0]]
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    ir.save(model, path.with_name("lookup.onnx"))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path.with_name("lookup.onnx")), providers=["CPUExecutionProvider"])
    (embedded,) = session.run(None, {"input_ids": np.array([IDS])})
    assert np.allclose(embedded[0], rounded(weights.read("model.embed_tokens.weight"))[IDS], atol=1e-6)


def test_fitted_weights_make_less_error_than_nearest_ones(tmp_path: Path) -> None:
    """As an export does it: the first layer's products, on the very inputs that calibration saw."""
    router, experts = make_system(tmp_path, SHAPES["llama3"])
    system = System.open(FAMILIES["llama3"], router, experts, max_seq_len=64)
    graph, weights = traced(system), system.router.weights
    draw = np.random.default_rng(0)
    texts = [Text(draw.integers(3, 300, 60).astype(np.int32), np.zeros(60, np.int8)) for _ in range(8)]
    known = Evidence(texts, [Mask(60, np.arange(60))] * 8, observe(graph, weights, [text.ids.tolist() for text in texts]))
    context = fit_context(graph, weights, known, tmp_path / "out")
    smoothed, fitted = StaticW8A8().fit(context)
    assert fitted.about["w8a8_share"] >= 0.6
    inputs: list[np.ndarray] = []
    BlockwiseForward(split(smoothed), [text.ids for text in texts], *reader(smoothed, weights)).observe(
        lambda matrix, _, x: inputs.append(x.copy()) if matrix.endswith("layers.0.self_attn.qkv_proj.weight") else None
    )
    x = np.concatenate(inputs)
    name = "model.model.layers.0.self_attn.qkv_proj.weight"
    exact = np.concatenate(list(rows(smoothed.sources[name], weights)))
    (stored,) = [each for each in context.shared.stored.values() if each.bytes == exact.size + 4 * len(exact) and close(each, exact)]
    errors = [np.square(x @ (each - exact).T).sum() for each in (stored.widened(exact.shape[1]), rounded(exact))]
    assert errors[0] < 0.9 * errors[1]
    path = written(smoothed, weights, tmp_path / "out", fitted, system.head)
    held = ir.load(path).graph.initializers[f"{name}.int8"].const_value
    assert held is not None and np.array_equal(
        held.numpy() * stored.scales.read(np.dtype(np.float32))[:, None], stored.widened(exact.shape[1])
    )
    logits, _ = run(path, IDS)
    with torch.no_grad():
        plain = load(system.router)(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].numpy()
    assert np.abs(logits - plain).mean() < 0.1 * plain.std()


def close(stored: Stored, exact: np.ndarray) -> bool:
    """Whether a stored matrix is a rounding of this one."""
    return bool(np.abs(stored.widened(exact.shape[1]) - exact).mean() < 0.05 * np.abs(exact).mean())


def test_without_calibration_there_is_no_scale(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs the scales of calibration"):
        StaticW8A8().bind(None, None, iter(()), Store(tmp_path))  # type: ignore[arg-type]


def test_the_heads_noise_is_told_in_logits(planned_router: PlannedRouter) -> None:
    plans = choose(planned_router.graph, planned_router.system.router.weights, planned_router.seen, planned_router.noise, share=0)
    by_name = {product.matrix: product for product in plans.at_a16}
    head = next(name for name in by_name if "layers" not in name)
    seen, columns = planned_router.seen[head], Columns.read(planned_router.graph.sources[head], planned_router.system.router.weights)
    out = int(planned_router.graph.model.graph.initializers[head].shape[0])
    assert by_name[head].noise == pytest.approx(logit_noise(seen, seen.absmax(), columns) / out)
