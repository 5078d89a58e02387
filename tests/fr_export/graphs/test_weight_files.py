"""Weight files: what lies where, against plain concatenation; and what an export makes of them."""

import hashlib
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.graphs.weight_files import LINE, PAGE, WeightFiles
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.tensorrt.build import logger
from tests.support.bundles import as_format, edit
from tests.support.exporting import ALL, export_checkpoints
from tests.support.stored_weights import stored_weights
from tests.support.systems import Shape, make_model, make_system


def graph(path: Path, store: Store, contents: list[bytes]) -> None:
    """A graph with one initialiser per content, written as an export writes it."""
    values = []
    for number, content in enumerate(contents):
        tensor = store.put(np.frombuffer(content, np.uint8), f"w{number}").tensor(f"w{number}", ir.DataType.UINT8, (len(content),))
        values.append(ir.Value(name=f"w{number}", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor))
    ir.save(ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 21}), ir_version=10), path)


sizes = st.lists(st.sampled_from([1, 2, 63, 64, 100, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE]), max_size=6)


@settings(deadline=None, max_examples=30)
@given(st.lists(sizes, min_size=1, max_size=3), st.integers(0, 2**32))
def test_every_graph_reads_what_was_put_in_and_every_content_lies_once(
    tmp_path_factory: pytest.TempPathFactory, models: list[list[int]], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    store, rng = Store(folder), np.random.default_rng(seed)
    contents = [[rng.integers(0, 3, size, np.uint8).tobytes() for size in model] for model in models]  # the short ones repeat
    for number, model in enumerate(contents):
        graph(folder / f"{number}.onnx", store, model)
    unread = store.put(np.arange(5 * PAGE) % 251, "unread")
    files_of = WeightFiles(store)
    planned = [files_of.plan(f"weights/{number}.bin", [folder / f"{number}.onnx"]) for number in range(len(contents))]
    files = [file.write() for file in planned]
    files_of.remove_unread()
    assert not unread.path.exists()
    names = {f"{number}.bin" for number, file in enumerate(files) if file is not None}
    assert {path.name for path in store.folder.iterdir()} == names if names else not store.folder.exists()
    stored = [tensor.sha256 for file in files if file is not None for tensor in file.tensors]
    assert sorted(stored) == sorted({hashlib.sha256(content).hexdigest() for model in contents for content in model})
    for number, model in enumerate(contents):
        weights = stored_weights(folder / f"{number}.onnx")
        assert [weights[f"w{place}"].read() for place in range(len(model))] == model
        assert all(weight.offset % (PAGE if weight.length >= PAGE else LINE) == 0 for weight in weights.values())
        for weight in weights.values():
            assert int(weight.file.stem) <= number, "a model reads its own file and those before it"
    for number, file in enumerate(files):
        if file is not None:
            data = (folder / f"weights/{number}.bin").read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
            for tensor in file.tensors:
                assert hashlib.sha256(data[tensor.offset : tensor.offset + tensor.bytes]).hexdigest() == tensor.sha256
            assert len(data) - sum(tensor.bytes for tensor in file.tensors) < PAGE * len(file.tensors)


def test_no_blob_lies_twice_but_the_one_that_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    graph(tmp_path / "model.onnx", store, [bytes([number]) * 10_000 for number in range(8)])
    most, unlink = [0], Path.unlink

    def measured(path: Path, **options: bool) -> None:
        most[0] = max(most[0], sum(file.stat().st_size for file in store.folder.iterdir()))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", measured)
    WeightFiles(store).plan("weights/model.bin", [tmp_path / "model.onnx"]).write()
    assert most[0] < 9 * 3 * PAGE, "at no time more than the eight blobs and one of them again"


def test_a_weight_file_that_fails_leaves_nothing_under_its_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    graph(tmp_path / "model.onnx", store, [b"abc"])
    next(iter(store.blobs.values())).path.unlink()
    with pytest.raises(FileNotFoundError):
        WeightFiles(store).plan("weights/model.bin", [tmp_path / "model.onnx"]).write()
    assert not (tmp_path / "weights/model.bin").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_never_written(tmp_path: Path, dtype: Any, value: float) -> None:
    store, values = Store(tmp_path), np.ones(100, dtype)
    store.put(values, "norm")
    values[70] = value
    with pytest.raises(
        InputError, match=rf"^The weight 'norm' would hold NaN or infinity in {np.dtype(dtype)}; export another precision\.$"
    ):
        store.put(values, "norm")
    assert [path.stem for path in store.folder.iterdir()] == list(store.blobs)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shape, str, dict[str, str], Path]:
    folder = tmp_path_factory.mktemp("system")
    shape = Shape(experts=2, layers=1)
    router, experts = make_system(folder, shape)
    return shape, router, experts, export_checkpoints(folder / "bundle", shape, router, experts)


def weights_of(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (bundle / "graphs/weights").iterdir()}


def test_a_bundle_has_one_file_of_weights_per_model(system: tuple[Shape, str, dict[str, str], Path]) -> None:
    *_, bundle = system
    Bundle.open(bundle).verify()
    assert weights_of(bundle).keys() == {"router.bin", "expert0.bin", "expert1.bin"}
    files = Manifest.read(bundle).files
    listed = {name: {(tensor.offset, tensor.bytes) for tensor in files[f"graphs/weights/{name}"].tensors} for name in weights_of(bundle)}
    read: dict[str, set[tuple[int, int]]] = {name: set() for name in listed}
    for path in (bundle / "graphs").glob("*.ort-cpu.*.onnx"):
        for weight in stored_weights(path).values():
            read[weight.file.name].add((weight.offset, weight.length))
    assert read == listed, "what is stored is read, and what is read is listed"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["format"] == 5
    assert {name for name, file in manifest["files"].items() if "tensors" in file} == {f"graphs/weights/{name}" for name in listed}


def test_another_expert_leaves_the_other_weight_files_as_they_are(system: tuple[Shape, str, dict[str, str], Path], tmp_path: Path) -> None:
    shape, router, experts, bundle = system
    other = make_model(tmp_path / "other", shape, 77, expert=True)
    changed = weights_of(export_checkpoints(tmp_path / "changed", shape, router, experts | {"expert0": str(other)}))
    before = weights_of(bundle)
    assert {name for name in before if before[name] != changed[name]} == {"expert0.bin"}


def test_weights_of_all_precisions_of_a_model_share_what_is_equal(system: tuple[Shape, str, dict[str, str], Path]) -> None:
    *_, bundle = system
    read = [set(stored_weights(bundle / f"graphs/router.ort-cpu.{precision}.onnx").values()) for precision in ALL]
    assert set.intersection(*read), "the tables of rotary"


def test_a_bundle_whose_tensors_are_files_of_their_own_loads_with_the_same_numbers(
    system: tuple[Shape, str, dict[str, str], Path], tmp_path: Path
) -> None:
    """As bundles of format 1 are, and the temporary ones that calibration texts are recorded with."""
    shape, router, experts, bundle = system
    with patch("fusionroute.fr_export.export.VariantWriter.gather_weights", return_value={}):
        unpacked = export_checkpoints(tmp_path / "bundle", shape, router, experts)
    edit(unpacked, as_format(1))
    content = json.loads((unpacked / "manifest.json").read_text())
    names = [path.stem for path in (unpacked / "graphs/weights").iterdir()]
    tensors = [tensor.sha256 for file in Manifest.read(bundle).files.values() for tensor in file.tensors]
    assert sorted(names) == sorted(tensors)
    assert sorted(names) == [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((unpacked / "graphs/weights").iterdir())]
    for precision in ALL:
        logits = []
        for folder in (bundle, unpacked):
            with FusionRuntime.load(folder, precision, threads=1, verify=True) as runtime:
                logits.append(runtime.score([5, 9, 200, 31]).logits)
        assert np.array_equal(logits[0], logits[1])
    manifest = Manifest.read(unpacked)
    manifest.write(unpacked)
    assert json.loads((unpacked / "manifest.json").read_text()) == content, "an older version reads what is written again"


def test_tensorrt_reads_the_values_of_a_weight_file(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    shape = Shape(experts=1, layers=1)
    router, experts = make_system(tmp_path, shape)
    request = Request(None, router, experts, ("fp32",), ("tensorrt",), tmp_path / "bundle", calibration="none")
    with patch("fusionroute.fr_export.export.measure", return_value=({}, "a test compares it")):
        export(request, Stages(Console(quiet=True)))
    log = logger(trt)
    builder = trt.Builder(log)
    for path in sorted((tmp_path / "bundle/graphs").glob("*.fp32.onnx")):
        network = builder.create_network(0)
        assert trt.OnnxParser(network, log).parse_from_file(str(path))
        constants = set()
        for layer in (network.get_layer(place) for place in range(network.num_layers)):
            if layer.type == trt.LayerType.CONSTANT:
                layer.__class__ = trt.IConstantLayer
                constants.add(np.asarray(layer.weights).tobytes())
        weights = stored_weights(path)
        assert len(weights) > 5 and all(weight.read() in constants for weight in weights.values())
