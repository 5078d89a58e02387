"""W8A8 graphs against plain torch whose weights and inputs are rounded, and what the plan promises."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fusionroute.calibration.blockwise_forward import BlockwiseForward
from fusionroute.calibration.record import RecordedText
from fusionroute.calibration.serving_masks import Mask
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.decoder_blocks import reader, split
from fusionroute.fr_export.graphs.source_rows import rows
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import SMALLEST_NORMAL, Stored
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.plan_w8a8 import choose, matrices
from fusionroute.fr_export.precision.w8a8 import PlannedW8A8, StaticW8A8, quantise
from fusionroute.fr_export.verify.torch_reference import load
from fusionroute.runtime.errors import InputError
from tests.support.calibration import fit_context, observe, run, traced, written
from tests.support.planned_router import IDS, SHAPES, PlannedRouter, uneven
from tests.support.systems import make_system


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
    texts = [RecordedText(draw.integers(3, 300, 60).astype(np.int32), np.zeros(60, np.int8)) for _ in range(8)]
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
    with pytest.raises(InputError, match=r"^8-bit activations need the scales of calibration: export them without --calibration none\.$"):
        StaticW8A8().bind(None, None, iter(()), Store(tmp_path))  # type: ignore[arg-type]
