"""Half precision throughout (`ort:cuda`): graphs that run on a GPU, held against torch on a CPU.

fp16 graphs run here as they are shipped (without ONNX Runtime's layout optimisations: 1.32 crashes on them in fp16),
though the CPU provider leaves out the rounding in front of products. Emulated copies, in fp16 and bf16, round every
result as a GPU does: see fr_export/verify/half_on_cpu.py.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES, Family
from fusionroute.fr_export.precision.half import rounded
from fusionroute.fr_export.verify.half_on_cpu import compute_half_on_cpu
from fusionroute.fr_export.verify.torch_reference import load, reference
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.errors import InputError, NumericalError
from tests.support.sparing import sparing
from tests.support.stored_weights import stored_weights
from tests.support.systems import Shape, make_system

HALVES = ("fp16", "bf16")
CAPACITY = 64
SHAPES = {
    "llama3, tied, biases, one KV head": Shape(experts=1, kv_heads=1, config={"tie_word_embeddings": True, "attention_bias": True}),
    "llama3, rotary outside, padded head": Shape(experts=1, head_dim=20),
    "gemma2": Shape("gemma2", experts=2),
    "qwen2": Shape("qwen2", experts=1),
    "qwen3": Shape("qwen3", experts=1, config={"attention_bias": True}),
    "olmo2": Shape("olmo2", experts=1),
    "smollm3": Shape("smollm3", experts=1),
    "gemma3": Shape("gemma3", experts=1),
    "phi3": Shape("phi3", experts=1),
    "phi3, rotary of half a head inside": Shape("phi3", experts=1, heads=2, kv_heads=1),
    "gemma2, padded head, three layers": Shape("gemma2", experts=2, layers=3, head_dim=12, kv_heads=4),
}


class Exported(NamedTuple):
    """A system exported for the GPU, and a text."""

    shape: Shape
    system: System
    bundle: Path
    ids: list[int]


def make(folder: Path, shape: Shape, family: Family | None = None, checkpoints: tuple[str, dict[str, str]] | None = None) -> Exported:
    """Export a system in fp16 and bf16 without comparing it."""
    router, experts = checkpoints or make_system(folder / "system", shape)
    family = family or FAMILIES[shape.family]
    with patch("fusionroute.fr_export.export.measure", return_value=({}, "a test compares it")):
        request = Request(family, router, experts, HALVES, ("ort:cuda",), folder / "bundle", max_seq_len=CAPACITY)
        export(request, Stages(Console(quiet=True)))
    ids = [int(i) for i in np.random.default_rng(1).integers(3, shape.vocab, 50)]
    return Exported(shape, System.open(family, router, experts, max_seq_len=CAPACITY), folder / "bundle", ids)


@pytest.fixture(
    scope="module", params=sparing(SHAPES, [name for name in SHAPES if name.startswith(("smollm3", "gemma3", "phi3", "qwen", "olmo2"))])
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Every shape once."""
    return make(tmp_path_factory.mktemp("half"), SHAPES[request.param])


def graph_of(bundle: Path, precision: str, model: str = "router") -> ir.Model:
    """A shipped graph."""
    return ir.load(bundle / f"graphs/{model}.ort-cuda.{precision}.onnx")


def run_fp16(bundle: Path, ids: Sequence[int], chunk: int, model: str = "router", extra: str | None = None) -> dict[str, np.ndarray]:
    """What a shipped fp16 graph answers for every position, read in chunks with its KV buffers carried; `extra` names
    one more output.
    """
    file = bundle / f"graphs/{model}.ort-cuda.fp16.onnx"
    if extra is not None:
        changed = ir.load(file)
        changed.graph.outputs.append(next(v for n in changed.graph for v in n.outputs if v.name == extra))
        file = file.with_suffix(".more.onnx")
        ir.save(changed, file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    past = [value for value in session.get_inputs() if value.name.startswith("past.")]
    assert {value.type for value in past} == {"tensor(float16)"}
    feeds: dict[str, Any] = {value.name: np.zeros((1, value.shape[1], CAPACITY, value.shape[3]), np.float16) for value in past}
    names = [output.name for output in session.get_outputs()]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names if not name.startswith("present.")}
    for start in range(0, len(ids), chunk):
        piece = np.array([ids[start : start + chunk]], np.int64)
        end = start + piece.shape[1]
        feeds |= {"input_ids": piece, "seqlens_k": np.array([end - 1], np.int32), "total_sequence_length": np.array(end, np.int32)}
        feeds["logit_positions"] = np.arange(piece.shape[1])
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        feeds |= {value.name: outputs[value.name.replace("past.", "present.")] for value in past}
        for name, collected in parts.items():
            collected.append(outputs[name][0])
    return {name: np.concatenate(collected) for name, collected in parts.items()}


@torch.no_grad()
def run_torch(exported: Exported, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The router as transformers runs it in a type, full prefix and no cache: logits [S, V] and final hidden states [S,
    H], fp32.
    """
    model = load(exported.system.router).to(dtype)
    ids = torch.tensor([exported.ids])
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return model(input_ids=ids, use_cache=False).logits[0].float().numpy(), hidden[0].float().numpy()


def gap(values: np.ndarray, expected: np.ndarray) -> float:
    """Mean |difference| in standard deviations of what was expected."""
    return float(np.abs(values - expected).mean() / expected.std())


def test_fp16_graphs_agree_with_torch_in_chunks_and_steps(exported: Exported) -> None:
    logits, hidden = run_torch(exported, torch.float32)
    routing = hidden @ exported.system.head.weight.T + exported.system.head.bias
    for chunk in (len(exported.ids), 7, 1):
        outputs = run_fp16(exported.bundle, exported.ids, chunk)
        assert outputs["logits"].dtype == outputs["routing"].dtype == np.float32
        assert gap(outputs["logits"], logits) < 0.002 and np.abs(outputs["logits"] - logits).max() < 0.03 * logits.std()
        assert gap(outputs["routing"], routing) < 0.004


def test_emulation_computes_what_the_fp16_graph_does_and_bf16_errs_no_more_than_torch(exported: Exported, tmp_path: Path) -> None:
    """The whole system, through the runtime; λ = 1 leaves the router's logits."""
    logits, _ = run_torch(exported, torch.float32)
    theirs, _ = run_torch(exported, torch.bfloat16)
    bundle = Path(shutil.copytree(exported.bundle, tmp_path / "bundle"))
    compute_half_on_cpu(bundle)
    shipped = run_fp16(exported.bundle, exported.ids, len(exported.ids))["logits"]
    (fused,) = reference(exported.system, [exported.ids], (0.5, 0.5))
    for precision in HALVES:
        with FusionRuntime.load(bundle, precision, lam=1.0, threads=1) as runtime:
            chunked = [runtime.score(exported.ids, chunk=chunk).logits for chunk in (len(exported.ids), 7, 1)]
        if precision == "fp16":
            assert max(gap(logits_, shipped) for logits_ in chunked) < 0.003
        else:
            assert 0 < max(gap(logits_, theirs) for logits_ in chunked) < 0.03
            assert max(gap(logits_, logits) for logits_ in chunked) < 1.2 * gap(theirs, logits)
        with FusionRuntime.load(bundle, precision, threads=1) as runtime:
            scores = runtime.score(exported.ids)
        same = scores.experts == fused.experts
        assert same.mean() > 0.95 and gap(scores.logits[same], fused.logits[same]) < {"fp16": 0.003, "bf16": 0.03}[precision]


def test_activations_are_narrow_and_the_islands_are_not(exported: Exported) -> None:
    half_types = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
    for precision, half in half_types.items():
        for model in ("router", "expert0"):
            graph = graph_of(exported.bundle, precision, model).graph
            for n in graph:
                kinds = {v.dtype for v in (*n.inputs, *n.outputs) if v is not None and v.name and v.dtype in (ir.DataType.FLOAT, half)}
                if n.op_type == "FusedMatMul":
                    assert kinds == ({ir.DataType.FLOAT} if n.outputs[0].name == "scores" else {half}), n.name
                elif n.op_type == "GroupQueryAttention":
                    assert kinds == {half}
                elif n.op_type.endswith("SimplifiedLayerNormalization"):
                    assert kinds == {ir.DataType.FLOAT if exported.system.family.wide_residual else half}
            types = {value.name: value.dtype for value in (*graph.inputs, *graph.outputs)}
            assert {types.pop(name) for name in ("logits", "routing") if name in types} == {ir.DataType.FLOAT}
            assert {kind for name, kind in types.items() if name.startswith(("past.", "present."))} == {half}


def test_the_routing_head_multiplies_in_fp32(exported: Exported) -> None:
    outputs = run_fp16(exported.bundle, exported.ids, len(exported.ids), extra="hidden")
    assert outputs["hidden"].dtype == np.float32
    head = exported.system.head
    exact = outputs["hidden"].astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias
    assert np.abs(outputs["routing"] - exact).max() < 1e-5 * np.abs(exact).max()


def test_weights_stand_once_and_as_torch_rounds_them(exported: Exported) -> None:
    """Matrices of the router and its tied embedding; norms too where they are narrow."""
    tied = exported.system.router.config.tie_word_embeddings
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        read = set(stored_weights(exported.bundle / f"graphs/router.ort-cuda.{precision}.onnx").values())
        embedding = exported.system.router.weights.read("model.embed_tokens.weight")
        same_size = [weight for weight in read if weight.length == 2 * embedding.size]
        assert len(same_size) == (1 if tied else 2)
        exact = torch.from_numpy(embedding).to(dtype).view(torch.int16).numpy().tobytes()
        assert exact in [weight.read() for weight in same_size]


def test_gemma2_beyond_65504_is_finite_and_right_and_a_naive_conversion_is_not(tmp_path: Path) -> None:
    """Residual stream and gate · up both leave fp16's range; what a plain fp16 graph does then is shown by one without
    the islands.
    """
    shape = Shape("gemma2", experts=2, layers=3)
    checkpoints = make_system(tmp_path / "system", shape)
    for folder in map(Path, (checkpoints[0], *checkpoints[1].values())):
        tensors = load_file(folder / "model.safetensors")
        for name in tensors:
            if name.endswith("post_feedforward_layernorm.weight"):
                # the norm adds outputs of this size to the residual stream
                tensors[name] = 5e4 * (1 + 0.1 * tensors[name])
            if name.endswith("pre_feedforward_layernorm.weight"):
                tensors[name] = 150 * (1 + 0.1 * tensors[name])  # gate and up stay in range, their product does not
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    islands = make(tmp_path / "islands", shape, checkpoints=checkpoints)
    stream, gated = largest_activations(islands)
    assert stream > 65_504 and gated > 65_504
    naive = make(tmp_path / "naive", shape, replace(FAMILIES["gemma2"], wide_residual=False), checkpoints)
    logits, hidden = run_torch(islands, torch.float32)
    routing = hidden @ islands.system.head.weight.T + islands.system.head.bias
    runs = [run_fp16(islands.bundle, islands.ids, chunk) for chunk in (50, 1)]
    assert not np.isfinite(run_fp16(naive.bundle, islands.ids, 50)["logits"]).all()
    for bundle in (islands.bundle, naive.bundle):
        compute_half_on_cpu(bundle)
    with FusionRuntime.load(islands.bundle, "fp16", lam=1.0, threads=1) as runtime:
        scores = [runtime.score(islands.ids, chunk=chunk) for chunk in (50, 1)]
    runs += [{"logits": one.logits, "routing": one.routing} for one in scores]
    for outputs in runs:
        assert np.isfinite(outputs["logits"]).all()
        assert gap(outputs["logits"], logits) < 0.01 and gap(outputs["routing"], routing) < 0.01
        assert (outputs["routing"].argmax(-1) == routing.argmax(-1)).all()
    with (
        FusionRuntime.load(naive.bundle, "fp16", lam=1.0, threads=1) as runtime,
        pytest.raises(NumericalError, match=r"of router in fp16 hold NaN or infinity at position 0: load another precision"),
    ):
        runtime.score(islands.ids)


@torch.no_grad()
def largest_activations(exported: Exported) -> tuple[float, float]:
    """Largest |value| of the router's residual stream, and of what enters down_proj."""
    model = load(exported.system.router)
    stream, gated = [0.0], [0.0]
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: stream.append(float((out[0] if isinstance(out, tuple) else out).abs().max())))
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: gated.append(float(args[0].abs().max())))
    model(input_ids=torch.tensor([exported.ids]), use_cache=False)
    return max(stream), max(gated)


def test_a_norm_beyond_the_range_is_refused(tmp_path: Path) -> None:
    shape = Shape(experts=1, layers=1)
    router, experts = make_system(tmp_path / "system", shape)
    tensors = load_file(Path(router) / "model.safetensors")
    tensors["model.norm.weight"][0] = 7e4
    save_file(tensors, Path(router) / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"^The router .* cannot be exported as fp16: The weight '.*norm.weight' holds values beyond fp16's 65,504"
    ):
        make(tmp_path, shape, checkpoints=(router, experts))
    assert not (tmp_path / "bundle").exists()


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=20), st.sampled_from(HALVES))
def test_rounding_is_that_of_torch(values: list[float], name: str) -> None:
    array = np.array(values, np.float32)
    exact = torch.from_numpy(array).to({"fp16": torch.float16, "bf16": torch.bfloat16}[name])
    if torch.isfinite(exact).all():
        half = rounded(array, name, "w")
        assert half.dtype == {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[name]
        assert np.array_equal(half.astype(np.float32), exact.float().numpy())
    else:
        with pytest.raises(InputError, match="'w' holds values beyond fp16's"):
            rounded(array, name, "w")
