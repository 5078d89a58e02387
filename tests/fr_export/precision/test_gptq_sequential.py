"""Calibrated rounding of whole models: each layer for what rounded layers give it; what models share, once."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fusionroute.calibration.record import RecordedText
from fusionroute.calibration.serving_masks import Mask
from fusionroute.calibration.table import Table
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import TABLE, Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import gptq_sequential, int4, int8
from fusionroute.fr_export.precision.blockwise import Stored, widened
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.gptq import Hessian, quantise
from fusionroute.fr_export.precision.gptq_sequential import round_sequentially
from fusionroute.fr_export.precision.kept_matrices import KeptMatrices
from fusionroute.fr_export.precision.shared_matrices import SharedMatrices
from fusionroute.fr_export.verify.torch_reference import load
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.errors import InputError
from tests.support.adapters import make_adapted_system
from tests.support.calibration import traced
from tests.support.sparing import sparing
from tests.support.stored_weights import stored_weights
from tests.support.systems import Shape, make_system

FORM = int4.FORMAT
Sharing = Sequence[tuple[Weights, Evidence]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def known(texts: list[np.ndarray]) -> Evidence:
    recorded = [RecordedText(ids, np.zeros(len(ids), np.int8)) for ids in texts]
    return Evidence(recorded, [Mask(len(ids), np.arange(len(ids))) for ids in texts], {})


def rounded(
    system: System, texts: list[np.ndarray], folder: Path, shared: SharedMatrices | None = None, sharing: Sharing = (),
    kept: KeptMatrices | None = None, note: Callable[[str], None] = lambda _: None, graph: Graph | None = None,
) -> dict[str, Stored]:  # fmt: skip
    graph = graph.clone() if graph else traced(system)
    formats = {name: FORM for name, value in graph.model.graph.initializers.items() if len(value.shape) == 2 and "rotary" not in name}
    return round_sequentially(
        FitContext(
            graph,
            system.router.weights,
            replace(known(texts), sharing=sharing),
            Store(folder),
            shared or SharedMatrices(),
            lambda _: None,
            kept=kept,
            note=note,
        ),
        formats,
    )


@pytest.mark.parametrize("family", sparing(["llama3", "gemma2", "smollm3", "gemma3", "phi3"], ("smollm3", "gemma3", "phi3")))
def test_matrices_are_rounded_for_the_inputs_that_rounded_ones_give(family: str, tmp_path: Path) -> None:
    """Against torch: hooks on a model whose earlier matrices hold the rounded weights."""
    router, experts = make_system(tmp_path, Shape(family, experts=1, layers=2, config={"tie_word_embeddings": True}))
    system = System.open(FAMILIES[family], router, experts)
    draw = np.random.default_rng(0)
    texts = [draw.integers(3, 300, length).astype(np.int32) for length in (90, 40, 1, 120)]
    done = rounded(system, texts, tmp_path / "store")
    check_rounded(done, [(load(system.router), texts)])
    head = next(name for name in done if "layers" not in name)
    assert done[head].widened(64).shape == (300, 64)


def test_matrices_that_were_kept_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    """All, all but some, or none: what is rounded is the same, and only what is missing or broken is rounded again."""
    _, router, experts = make_adapted_system(tmp_path, Shape(layers=1), [{"r": 2}, {"r": 4}])
    system = System.open(None, router, experts)
    draw = np.random.default_rng(0)
    texts = [draw.integers(3, 300, length).astype(np.int32) for length in (60, 30)]
    sharing = [(system.experts[0].weights, known(texts[1:]))]
    graph = traced(system)
    calls: list[int] = []

    def counted(*given: Any) -> Any:
        calls.append(1)
        return quantise(*given)

    monkeypatch.setattr(gptq_sequential, "quantise", counted)

    def run(number: int, given: list[np.ndarray] = texts, sharing: Sharing = sharing) -> tuple[list[tuple[str, str, str]], int, list[str]]:
        notes: list[str] = []
        calls.clear()
        done = rounded(system, given, tmp_path / str(number), None, sharing, KeptMatrices(), notes.append, graph)
        return [(name, each.values.sha256, each.scales.sha256) for name, each in done.items()], len(calls), notes

    expected, first, notes = run(0)
    count = len(expected)
    assert first >= count and not notes, "a call for each slice"
    assert run(1) == (expected, 0, [f"{count} of {count} matrices"])
    (folder,) = (tmp_path / "cache" / "fusionroute" / "rounded").iterdir()
    records = sorted(folder.glob("*.json"))
    assert len(records) == count
    records[0].unlink()
    again, rounded_again, _ = run(2)
    assert again == expected and 1 <= rounded_again < first
    blob = max(folder.glob("*.bin"), key=lambda path: path.stat().st_size)
    content = blob.read_bytes()
    blob.unlink()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again, rounded_again, _ = run(3)
    assert again == expected and rounded_again >= 1
    assert any("is rounded again (it is not what was kept)" in line for line in log)
    assert run(4, texts[:1])[1] == first, "other texts"
    assert run(5, texts, [])[1] == first, "nobody shares the matrices"
    KeptMatrices().remove()
    assert folder.exists(), "another export's"
    kept = KeptMatrices()
    rounded(system, texts, tmp_path / "last", None, sharing, kept)
    kept.remove()
    assert not folder.exists()


def test_nothing_is_kept_where_the_disk_has_no_room(tmp_path: Path) -> None:
    router, experts = make_system(tmp_path, Shape(experts=1, layers=1))
    system = System.open(None, router, experts)
    texts = [np.arange(3, 40, dtype=np.int32)]
    rounded(system, texts, tmp_path / "store", kept=KeptMatrices(reserve=1 << 62))
    (folder,) = (tmp_path / "cache" / "fusionroute" / "rounded").iterdir()
    assert not list(folder.glob("*.json")) and not list(folder.glob("*.bin"))


def test_a_base_is_rounded_for_the_inputs_of_all_models_that_read_it(tmp_path: Path) -> None:
    """Experts add what sets them apart to the rounded matrices. One of them has no texts."""
    _, router, experts = make_adapted_system(tmp_path, Shape(layers=2), [{"r": 2}, {"r": 4}, {"r": 3}, {"r": 4}])
    system = System.open(None, router, experts)
    draw = np.random.default_rng(0)
    texts = [[draw.integers(3, 300, length).astype(np.int32) for length in lengths] for lengths in ((70, 40), (130, 1), (90,), ())]
    sharing = [(expert.weights, known(own)) for expert, own in zip(system.experts, texts[1:], strict=True)]
    done = rounded(system, texts[0], tmp_path / "store", sharing=sharing)
    models = [load(model) for model in system.models]
    check_rounded(done, list(zip(models, texts, strict=True)))
    alone = rounded(system, texts[0], tmp_path / "alone")
    matrix = "model.model.layers.0.mlp.down_proj.weight"
    width = models[0].get_submodule(matrix.removeprefix("model.").removesuffix(".weight")).in_features
    assert not np.array_equal(done[matrix].widened(width), alone[matrix].widened(width)), "else the experts do not count"


def check_rounded(done: dict[str, Stored], models: list[tuple[Any, list[np.ndarray]]]) -> None:
    """Against hooks on models whose earlier matrices hold the rounded weights, the first one's. All but the first keep
    what sets them apart from it.
    """
    model = models[0][0]

    def inputs(name: str) -> Hessian:
        hessian = Hessian(model.get_submodule(name).in_features)
        for each, texts in models:
            hook = each.get_submodule(name).register_forward_pre_hook(lambda _, args: hessian.see(args[0][0].numpy()))
            with torch.no_grad():
                for ids in texts:
                    each(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False)
            hook.remove()
        return hessian

    packed = hasattr(model.model.layers[0].mlp, "gate_up_proj")
    attention = ["self_attn.qkv_proj"] if packed else ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    gates = ["mlp.gate_up_proj"] if packed else ["mlp.gate_proj", "mlp.up_proj"]
    steps: list[dict[str, list[str]]] = [
        {"self_attn.qkv_proj": attention},
        {"self_attn.o_proj": ["self_attn.o_proj"]},
        {gate: [gate] for gate in gates},
        {"mlp.down_proj": ["mlp.down_proj"]},
    ]
    for layer in range(2):
        at = f"model.layers.{layer}"
        for step in steps:
            source = f"{at}.{next(iter(step.values()))[0]}"
            factor = inputs(source).factor()
            replaced: dict[str, np.ndarray] = {}
            for matrix, stack in step.items():
                weights = torch.cat([model.get_submodule(f"{at}.{part}").weight.data for part in stack]).numpy()
                expected = quantise(weights, factor, FORM)
                expected_values = widened(expected, FORM.bits, weights.shape[1])
                values = done[f"model.{at}.{matrix}.weight"].widened(weights.shape[1])
                # but for values that lie between two levels
                assert (np.abs(values - expected_values) <= 1e-6).mean() > 0.98, matrix
                sizes = [len(model.get_submodule(f"{at}.{part}").weight) for part in stack]
                replaced |= dict(zip(stack, np.split(values, np.cumsum(sizes)[:-1]), strict=True))
            for part, values in replaced.items():
                change = torch.from_numpy(values.copy()) - model.get_submodule(f"{at}.{part}").weight.data
                for each, _ in models:
                    each.get_submodule(f"{at}.{part}").weight.data += change


def request(folder: Path, shape: Shape, precisions: tuple[str, ...], calibration: str) -> tuple[Request, list[Path]]:
    router, experts = make_system(folder, shape)
    export_request = Request(
        FAMILIES[shape.family], router, experts, precisions, ("ort:cpu",), folder / "bundle", calibration=calibration, force=True
    )
    return export_request, [Path(router), *map(Path, experts.values())]


def prompts(folder: Path) -> str:
    file = folder / "prompts.txt"
    file.write_text("\n".join(f"a prompt about {word} and so on" for word in ("rain", "stone", "trees", "the sea", "bread", "iron")))
    return str(file)


def weights_of(bundle: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((bundle / "graphs").glob(pattern))}


def test_an_export_calibrates_keeps_its_table_and_can_use_it_again(tmp_path: Path) -> None:
    export_request, _ = request(
        tmp_path, Shape(experts=2, tokenizer=True, config={"tie_word_embeddings": True}), ("int8", "int4"), prompts(tmp_path)
    )
    report = export(export_request, Stages(Console(quiet=True)))
    names = [stage["name"] for stage in report["stages"]]
    assert "recording what the system does" in names and "calibrating" in names
    assert not (export_request.out / "recording").exists()
    assert 4.3 < report["variants"][1]["bits_per_weight"] <= 5.0
    table = Table.load(export_request.out / TABLE)
    assert len(table.texts) == 5 and list(table.models) == ["router", "expert0", "expert1"]
    first = weights_of(export_request.out, "*.onnx") | weights_of(export_request.out, "weights/*")
    saved = tmp_path / "saved.safetensors"
    shutil.copyfile(export_request.out / TABLE, saved)
    again = Request(**{**export_request.__dict__, "calibration": str(saved)})
    report = export(again, Stages(Console(quiet=True)))
    assert not any("recording" in stage["name"] for stage in report["stages"])
    assert weights_of(export_request.out, "*.onnx") | weights_of(export_request.out, "weights/*") == first
    nearest = export(Request(**{**export_request.__dict__, "calibration": "none"}), Stages(Console(quiet=True)))
    assert not (export_request.out / TABLE).exists() and nearest["variants"][1]["bits_per_weight"] == 4.625
    rounded = weights_of(export_request.out, "weights/*")
    assert rounded.keys() <= first.keys() and all(first[name] != content for name, content in rounded.items())
    other, _ = request(tmp_path / "other", Shape(experts=2, hidden=96, tokenizer=True), ("int4",), str(saved))
    with pytest.raises(InputError, match="calibrate this system instead"):
        export(other, Stages(Console(quiet=True)))
    assert not other.out.exists()


def test_what_models_share_is_stored_once_and_an_expert_never_asked_rounds_to_nearest(tmp_path: Path) -> None:
    shape = Shape(vocab=400, experts=2, tokenizer=True, config={"tie_word_embeddings": True})
    export_request, (router, first, second) = request(tmp_path, shape, ("int8", "int4"), prompts(tmp_path))
    head = load_file(router / "routing_head.safetensors")
    head["routing_head.bias"] = torch.tensor([1e6, 0.0])
    save_file(head, router / "routing_head.safetensors")
    tensors, embedding = load_file(first / "model.safetensors"), "model.embed_tokens.weight"
    save_file(tensors | {embedding: load_file(router / "model.safetensors")[embedding]}, first / "model.safetensors", {"format": "pt"})
    export(export_request, Stages(Console(quiet=True)))
    matrix = 400 * 64
    places = {weight for path in (export_request.out / "graphs").glob("*.onnx") for weight in stored_weights(path).values()}
    # the router's, which the first expert reads too, and the second expert's
    for size, models in ((matrix, 2), (matrix // 2, 2)):
        assert sum(weight.length == size for weight in places) == models
    stored = {weight.read() for weight in places}
    for name, tensor in load_file(second / "model.safetensors").items():
        if name.endswith("down_proj.weight"):
            assert int8.quantise(tensor.numpy()).values.tobytes() in stored
    with FusionRuntime.load(export_request.out, "int4") as runtime:
        assert set(runtime.generate([5, 9, 12], max_new_tokens=8).experts) == {"expert0"}


def test_weights_beyond_the_range_are_refused_by_name(tmp_path: Path) -> None:
    export_request, (router, *_) = request(tmp_path, Shape(experts=1, tokenizer=True), ("int4",), prompts(tmp_path))
    tensors = load_file(router / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 3e6
    save_file(tensors, router / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"router.* cannot be exported as int4: The weight '.*up_proj.weight' holds values beyond"):
        export(export_request, Stages(Console(quiet=True)))


def test_inputs_wait_for_one_another_but_not_for_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    random, tokens, sizes = np.random.default_rng(0), gptq_sequential.TOKENS, list[int]()
    inputs = [random.standard_normal((rows, 4)).astype(np.float32) for rows in (tokens - 1, 5, 3, tokens + 2, 7)]
    see = Hessian.see

    def noted(self: Hessian, x: np.ndarray) -> None:
        sizes.append(len(x))
        see(self, x)

    def observe(told: Callable[[str, int, np.ndarray], None]) -> None:
        for number, x in enumerate(inputs):
            told("first", number, x)
            told("second", number, np.full((9, 4), np.nan, np.float32))  # reads the same value

    monkeypatch.setattr(Hessian, "see", noted)
    block = SimpleNamespace(observed={"first": "value", "second": "value"}, channels={"first": 4, "second": 4})
    total: Any = gptq_sequential.hessian(SimpleNamespace(block=block, observe=observe))  # type: ignore[arg-type]
    assert sizes == [tokens + 4, tokens + 5, 7]
    x = np.concatenate(inputs).astype(np.float64)
    np.testing.assert_allclose(total.sum.numpy(), x.T @ x, rtol=1e-4, atol=1e-2)
