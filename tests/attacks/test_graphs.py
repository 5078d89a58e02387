"""Graphs that read what they should not, or never end. The manifest agrees with each: its author wrote both."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from fusionroute.runtime import BundleError
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.finite_weights import check_finite
from fusionroute.runtime.graph_file import external_files
from tests.support.bundles import edit, refusal, rehash

onnx = pytest.importorskip("onnx")
GRAPH = "graphs/router.ort-cpu.fp32.onnx"


def put(bundle: Path, content: bytes) -> None:
    (bundle / GRAPH).write_bytes(content)
    rehash(bundle, GRAPH)
    edit(bundle, lambda manifest: manifest.update(variants=[each for each in manifest["variants"] if each["precision"] == "fp32"]))


def changed(bundle: Path, change: Callable[[Any], object]) -> None:
    model = onnx.load(bundle / GRAPH, load_external_data=False)
    change(model)
    put(bundle, model.SerializeToString())


def external(location: str) -> Any:
    tensor = onnx.TensorProto(data_type=1, dims=[1], name="outside", data_location=1)
    tensor.external_data.add(key="location", value=location)
    return tensor


LOCATIONS = {
    "an unlisted file": "weights/unlisted.bin",
    "an absolute path": "/etc/passwd",
    "a path out of the bundle": "../../outside.bin",
    "a path within, in another spelling": "weights/../weights/router.bin",
    "memory of this process": "*/_ORT_MEM_ADDR_/*",
    "nothing": "",
}
# how a graph may hold a tensor; onnx 1.21 and ONNX Runtime looked at initialisers alone for long
HOLDERS: dict[str, Callable[[Any, Any], object]] = {
    "initialiser": lambda model, tensor: model.graph.initializer.append(tensor),
    "constant": lambda model, tensor: model.graph.node.append(onnx.helper.make_node("Constant", [], ["outside"], value=tensor)),
    "several of a node": lambda model, tensor: model.graph.node.append(onnx.helper.make_node("Constant", [], ["outside"], other=[tensor])),
    "sparse": lambda model, tensor: model.graph.sparse_initializer.add(dims=[1]).values.CopyFrom(tensor),
    "sparse of a node": lambda model, tensor: model.graph.node.append(
        onnx.helper.make_node("Constant", [], ["outside"], sparse_value=onnx.SparseTensorProto(values=tensor, dims=[1]))
    ),
    "initialiser of a branch": lambda model, tensor: branch(lambda part: part.graph.initializer.append(tensor))(model),
    "constant of a branch": lambda model, tensor: branch(lambda part: HOLDERS["constant"](part, tensor))(model),
}


@pytest.mark.parametrize("location", LOCATIONS)
def test_weights_are_read_from_listed_files_only(bundle: Path, location: str) -> None:
    (bundle / "graphs/weights/unlisted.bin").write_bytes(bytes(8))
    changed(bundle, lambda model: HOLDERS["initialiser"](model, external(LOCATIONS[location])))
    path = str(Path("graphs") / LOCATIONS[location])
    assert refusal(bundle) == f"The graph {bundle / GRAPH} reads {path!r}, which the manifest does not name; export the bundle again."


@pytest.mark.parametrize("holder", HOLDERS)
def test_weights_are_looked_for_everywhere(bundle: Path, holder: str) -> None:
    changed(bundle, lambda model: HOLDERS[holder](model, external("weights/unlisted.bin")))
    assert "reads 'graphs/weights/unlisted.bin', which the manifest does not name" in refusal(bundle)


@pytest.mark.parametrize("location", ["weights/unlisted.bin", "/etc/passwd", "../../outside.bin"])
def test_a_look_for_nan_opens_listed_files_only(bundle: Path, location: str) -> None:
    """As `inspect --verify` looks at graphs that no device has opened."""
    changed(bundle, lambda model: HOLDERS["initialiser"](model, external(location)))
    with pytest.raises(BundleError) as caught:
        check_finite(Bundle.open(bundle))
    path = str(PurePosixPath("graphs") / location)
    expected = f"cannot be read (it reads {path!r}, which the manifest does not name); copy or export the bundle again."
    assert str(caught.value) == f"{bundle / GRAPH} {expected}"


def bomb(model: Any) -> None:
    """Local functions that call each other twice, 30 levels deep: 2³⁰ nodes when they are inlined."""
    make = onnx.helper.make_function
    for level in range(30):
        inner, domain = (f"F{level - 1}", "local") if level else ("Identity", "")
        nodes = [onnx.helper.make_node(inner, [a], [b], domain=domain) for a, b in (("a", "t"), ("t", "b"))]
        imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("local", 1)]
        model.functions.append(make("local", f"F{level}", ["a"], ["b"], nodes, imports))


def loop(operator: str, **attributes: Any) -> Callable[[Any], None]:
    body = onnx.helper.make_graph([], "body", [], [])
    graphs = dict.fromkeys(attributes.pop("graphs", ["body"]), body)
    return lambda model: model.graph.node.append(onnx.helper.make_node(operator, ["trip", "", "x"], ["y"], **graphs))


def branch(change: Callable[[Any], object]) -> Callable[[Any], None]:
    """What a change adds to a graph, in a branch of a condition."""

    def add(model: Any) -> None:
        part = onnx.ModelProto()
        change(part)
        empty = onnx.helper.make_graph([], "else", [], [])
        model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=part.graph, else_branch=empty))

    return add


SUBGRAPHS = "it has subgraphs, such as those of loops, which may make a step endless"
BOMBS: dict[str, tuple[Callable[[Any], object], str]] = {
    "functions": (bomb, "it has local functions, which may make loading it endless"),
    "loop": (loop("Loop"), SUBGRAPHS),
    "scan": (loop("Scan"), SUBGRAPHS),
    "loop in a branch": (branch(loop("Loop")), SUBGRAPHS),
    "branches in a branch": (branch(branch(lambda model: None)), SUBGRAPHS),
    "native code in a branch": (
        branch(lambda model: model.graph.node.append(onnx.helper.make_node("EPContext", [], ["y"], domain="com.microsoft"))),
        "it has nodes of native code",
    ),
    "native code": (
        lambda model: model.graph.node.append(
            onnx.helper.make_node("EPContext", [], ["y"], ep_cache_context="x.so", domain="com.microsoft")
        ),
        "it has nodes of native code",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_graphs_that_never_end_are_refused_before_they_are_loaded(bundle: Path, name: str) -> None:
    change, why = BOMBS[name]
    changed(bundle, change)
    assert refusal(bundle) == f"The graph {bundle / GRAPH} is refused, since {why}; export the bundle again."


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x00\x00\x00\x00ORTM" + bytes(64), "it is no ONNX file"),  # ONNX Runtime's own format
        (b"\x3a\xff\xff\xff\xff\x0f", "it is cut off"),  # a graph of 4 GB in 6 bytes
        (b"\x3a\x05ab", "it is cut off"),
        (b"\x3b" * 1000, "it is no ONNX file"),  # groups, nested for ever
        (b"\xff" * 20, "it is cut off"),
    ],
)
def test_files_that_are_no_graphs(bundle: Path, content: bytes, why: str) -> None:
    put(bundle, content)
    assert refusal(bundle) == f"The graph {bundle / GRAPH} is refused, since {why}; export the bundle again."


def test_the_locations_are_those_that_onnx_reads(bundle: Path) -> None:
    for path in (bundle / "graphs").glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        expected = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}
        assert external_files(path.read_bytes()) == expected
