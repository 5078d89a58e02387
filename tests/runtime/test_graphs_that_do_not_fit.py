"""Graphs with other inputs, outputs, types or sizes than the manifest says, and weights that are not finite: refused at load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime import BundleError, FusionError, FusionRuntime
from fusionroute.runtime.backends.keys_values import zeros
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.finite_weights import check_finite
from fusionroute.runtime.graph_tensors import positions, tensors
from tests.support.bundles import edit, refusal, rehash

onnx: Any = pytest.importorskip("onnx")
ROUTER, EXPERT, FUSION = "graphs/router.ort-cpu.fp32.onnx", "graphs/expert0.ort-cpu.fp32.onnx", "graphs/fusion.onnx"
BASE = "graphs/base.ort-cpu.fp32.onnx"
Edit = Callable[[Any], object]


def change_graph(bundle: Path, name: str, change: Edit) -> None:
    model = onnx.load(bundle / name, load_external_data=False)
    change(model.graph)
    (bundle / name).write_bytes(model.SerializeToString())
    rehash(bundle, name)


def renamed(kind: str, old: str) -> Edit:
    """Another name for an input or output, throughout the graph."""

    def change(graph: Any) -> None:
        next(value for value in getattr(graph, kind) if value.name == old).name = "other"
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = ["other" if name == old else name for name in names]

    return change


def dropped(old: str) -> Edit:
    def change(graph: Any) -> None:
        rest = [value for value in graph.output if value.name != old]
        del graph.output[:]
        graph.output.extend(rest)

    return change


def added(graph: Any) -> None:
    graph.input.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1]))


def sized(kind: str, name: str, axis: int, size: int) -> Edit:
    def change(graph: Any) -> None:
        value = next(value for value in getattr(graph, kind) if value.name == name)
        value.type.tensor_type.shape.dim[axis].dim_value = size

    return change


GRAPHS: dict[str, tuple[str, Edit, str]] = {
    "router length": (ROUTER, renamed("input", "seqlens_k"), "the input seqlens_k"),
    "router ids": (ROUTER, renamed("input", "input_ids"), "the input input_ids"),
    "router positions": (ROUTER, renamed("input", "logit_positions"), "the input logit_positions"),
    "router cache": (ROUTER, renamed("input", "past.0.key"), "the input past.0.key"),
    "router present": (ROUTER, dropped("present.0.value"), "the output present.0.value"),
    "router without routing": (ROUTER, dropped("routing"), "the output routing"),
    "router one input more": (ROUTER, added, "the input more"),
    "router two texts": (ROUTER, sized("input", "input_ids", 0, 2), "the input input_ids"),
    "expert logits": (EXPERT, dropped("logits"), "the output logits"),
    "expert of another context": (EXPERT, sized("input", "past.0.key", 2, 7), "the input past.0.key"),
    "fusion without rows": (FUSION, dropped("fused"), "the output fused"),
    "fusion without a normaliser": (FUSION, dropped("sampling_normaliser"), "the output sampling_normaliser"),
    "fusion of another name": (FUSION, renamed("input", "penalty"), "the input penalty"),
}


def check_refusal(bundle: Path, graph: str, change: Edit, wrong: str) -> None:
    """Of a bundle with one graph changed: the sentence names the graph and what is wrong."""
    change_graph(bundle, graph, change)
    with pytest.raises(BundleError) as caught:
        FusionRuntime.load(bundle, "fp32", "cpu", threads=1)
    assert str(caught.value) == (
        f"The graph {bundle / graph} does not have the inputs and outputs that the manifest describes ({wrong}); export the bundle again."
    )


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_another_signature(bundle: Path, name: str) -> None:
    graph, change, wrong = GRAPHS[name]
    check_refusal(bundle, graph, change, wrong)


def retyped(graph: Any) -> None:
    """The fusion graph's k as int32, which a cast widens."""
    value = next(value for value in graph.input if value.name == "k")
    value.name = "narrow"
    value.type.tensor_type.elem_type = onnx.TensorProto.INT32
    graph.node.insert(0, onnx.helper.make_node("Cast", ["narrow"], ["k"], to=onnx.TensorProto.INT64))
    value.name = "k"
    graph.node[0].input[0] = "k"
    graph.node[0].output[0] = "wide"
    for node in graph.node[1:]:
        node.input[:] = ["wide" if name == "k" else name for name in node.input]


def test_a_graph_of_another_type_and_one_in_anothers_place(bundle: Path) -> None:
    change_graph(bundle, FUSION, retyped)
    assert "(the input k)" in refusal(bundle)
    edit(bundle, lambda content: [variant.update(fusion_graph=ROUTER) for variant in content["variants"]])
    assert "router.ort-cpu.fp32.onnx does not have the inputs and outputs that the manifest describes (the input router_logits)" in refusal(
        bundle
    )


PAIRS: dict[str, tuple[str, Edit, str]] = {
    "segments": (BASE, renamed("input", "segments"), "the input segments"),
    "the expert's length": (BASE, renamed("input", "expert.seqlens_k"), "the input expert.seqlens_k"),
    "the expert's cache": (BASE, dropped("expert.present.0.key"), "the output expert.present.0.key"),
    "routing": (BASE, dropped("routing"), "the output routing"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_graphs_of_a_pair_of_another_signature(shared: Path, tmp_path: Path, name: str) -> None:

    bundle = Path(shutil.copytree(shared, tmp_path / "bundle"))
    graph, change, wrong = PAIRS[name]
    check_refusal(bundle, graph, change, wrong)


def test_a_context_beyond_the_rotary_tables(bundles: list[Path], tmp_path: Path) -> None:

    for number, folder in enumerate(bundles):
        bundle = Path(shutil.copytree(folder, tmp_path / str(number)))
        graph = bundle / (BASE if number == 2 else ROUTER)
        assert positions(graph.read_bytes()) == json.loads((bundle / "manifest.json").read_text())["max_seq_len"] == 1024
        edit(bundle, lambda content: content.update(max_seq_len=1025))
        with pytest.raises(BundleError) as caught:
            FusionRuntime.load(bundle, "fp32", "cpu", threads=1)
        assert str(caught.value) == f"The graph {graph} is for texts of 1024 tokens and the manifest says 1025; export the bundle again."


def test_caches_that_no_machine_holds() -> None:
    with pytest.raises(FusionError, match=r"^Keys and values need .* GB of address space, which this process has not"):
        zeros((1 << 31, 1 << 20))
    with pytest.raises(FusionError, match=r"^Keys and values need"):
        zeros((1 << 40, 1 << 40))


def test_tensors_are_those_that_onnx_reads(all_bundles: list[Path]) -> None:
    for folder in all_bundles:
        for graph in sorted((folder / "graphs").glob("*.onnx")):
            model = onnx.load(graph, load_external_data=False)
            listed = {each.name: each for each in tensors(graph.read_bytes())}
            for expected in model.graph.initializer:
                each = listed[expected.name]
                external = {entry.key: entry.value for entry in expected.external_data}
                assert (each.type, each.dims) == (expected.data_type, tuple(expected.dims))
                assert (each.location, each.offset) == (external.get("location", ""), int(external.get("offset", 0)))
                assert bytes(each.data or b"") == expected.raw_data
        check_finite(Bundle.open(folder))


@pytest.mark.parametrize("content", [b"\x07", b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x02\x2a\x10", b"\xff" * 12])
def test_what_is_no_graph_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="it is"):
        list(tensors(content))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_and_norms_that_are_not_finite_are_refused_when_asked(bundle: Path, precision: str, value: float) -> None:
    name = f"graphs/router.ort-cpu.{precision}.onnx"
    kind = "scale" if precision == "int8" else "weight"
    each = next(each for each in tensors((bundle / name).read_bytes()) if kind in each.name and each.location and each.type == 1)
    file = bundle / "graphs" / each.location
    data = bytearray(file.read_bytes())
    data[each.offset + 4 : each.offset + 8] = np.float32(value).tobytes()
    file.write_bytes(data)
    edit(bundle, lambda content: content["files"][f"graphs/{each.location}"].pop("tensors"))
    rehash(bundle, f"graphs/{each.location}")
    FusionRuntime.load(bundle, precision, "cpu").close()
    with pytest.raises(BundleError) as caught:
        FusionRuntime.load(bundle, precision, "cpu", verify=True)
    assert str(caught.value) == f"The tensor '{each.name}' of {bundle / name} holds NaN or infinity; export the bundle again."


def test_a_norm_in_the_graph_itself_that_is_not_finite_is_refused_when_asked(bundle: Path) -> None:
    def change(graph: Any) -> None:
        norm = next(each for each in graph.initializer if each.name == "model.model.norm.weight")
        values = np.frombuffer(norm.raw_data, np.float32).copy()
        values[5] = np.nan
        norm.raw_data = values.tobytes()

    change_graph(bundle, ROUTER, change)
    with pytest.raises(BundleError) as caught:
        FusionRuntime.load(bundle, "fp32", "cpu", verify=True)
    assert str(caught.value) == f"The tensor 'model.model.norm.weight' of {bundle / ROUTER} holds NaN or infinity; export the bundle again."


def test_factors_that_are_not_finite_are_refused_when_asked(shared: Path, tmp_path: Path) -> None:

    bundle = Path(shutil.copytree(shared, tmp_path / "bundle"))
    factors = json.loads((bundle / "manifest.json").read_text())["variants"][0]["pair"]["factors"]
    name = next(iter(factors.values()))
    data = bytearray((bundle / name).read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    (bundle / name).write_bytes(data)
    rehash(bundle, name)
    with pytest.raises(BundleError, match=rf"^The tensor '.+' of {bundle / name} holds NaN or infinity; export the bundle again\.$"):
        FusionRuntime.load(bundle, "fp32", "cpu", verify=True)
