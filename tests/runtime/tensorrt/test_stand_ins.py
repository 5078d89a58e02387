"""What stands in for TensorRT's engines in tests says of tensors what TensorRT-RTX's own parser says, without a GPU."""

from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime.manifest import FUSION, Manifest
from fusionroute.runtime.tensorrt.loading import logger
from tests.support.simulated.bundles import write_bundle, write_pair_bundle
from tests.support.simulated.cuda import Cuda
from tests.support.simulated.machine import Machine
from tests.support.simulated.tensorrt import Engine, Location

rtx = pytest.importorskip("tensorrt_rtx")


def parsed(graph: Path) -> tuple[Any, Any, Any]:
    """The network of a graph, and what it needs to stay alive."""
    log = logger(rtx)
    builder = rtx.Builder(log)
    network = builder.create_network(0)
    parser = rtx.OnnxParser(network, log)
    assert parser.parse_from_file(str(graph)), log.last
    return network, parser, builder


@pytest.mark.parametrize("write", [write_bundle, write_pair_bundle])
@pytest.mark.parametrize("rows", [False, True])
def test_names_types_shapes_and_places_are_the_parser_s(tmp_path: Path, write: Any, rows: bool) -> None:
    folder = write(tmp_path / "bundle", rows=rows)
    (variant,) = Manifest.read(folder).variants
    for name, path in variant.engine_graphs.items():
        network, *alive = parsed(folder / path)
        engine = Engine(Cuda(Machine()), folder / path, None)
        theirs = [network.get_input(place) for place in range(network.num_inputs)]
        results = [network.get_output(place) for place in range(network.num_outputs)]
        assert [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)] == [value.name for value in (*theirs, *results)]
        for value in (*theirs, *results):
            assert engine.get_tensor_dtype(value.name).name == value.dtype.name, value.name
        for value in theirs:
            assert engine.get_tensor_shape(value.name) == tuple(value.shape), value.name
            on_host = engine.get_tensor_location(value.name) is Location.HOST
            assert on_host == value.is_shape_tensor == (name == FUSION and value.name == "k"), value.name
        for value in results:  # the parser does not know every size that follows from shapes
            ours = engine.get_tensor_shape(value.name)
            assert len(ours) == len(value.shape) and all(b in (-1, a) for a, b in zip(ours, value.shape, strict=True)), value.name
        del alive


def test_the_real_logger_keeps_what_the_library_says(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x08 no graph")
    log = logger(rtx)
    assert log.last == "it gives no reason"
    network = rtx.Builder(log).create_network(0)
    assert not rtx.OnnxParser(network, log).parse_from_file(str(tmp_path / "broken.onnx"))
    assert log.last != "it gives no reason" and "\n" not in log.last
