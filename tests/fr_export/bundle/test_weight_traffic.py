"""Bytes of weights that a token reads, against the files on disk and the number of weights."""

from pathlib import Path

import onnx_ir as ir
import pytest

from fusionroute.runtime.manifest import Manifest
from tests.support.exporting import ALL, export_system
from tests.support.systems import Shape

SMALL = 2048  # bytes of constants that stand in a graph itself
LOOK_UPS = ("Gather", "GatherBlockQuantized")


@pytest.fixture(scope="module", params=["llama3", "gemma2"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shape]:
    shape = Shape(request.param, layers=1, experts=2, vocab=512, expert_config={"intermediate_size": 192})
    return export_system(tmp_path_factory.mktemp(shape.family), shape, ALL)[0], shape


def on_disk(graph: Path) -> int:
    """Stored bytes that a graph's nodes read for one token. Tables of look-ups and of rotary count one row."""
    whole: dict[str, int] = {}
    rows: dict[str, int] = {}
    widened: dict[str, int] = {}
    for node in ir.load(graph).graph:
        for place, value in enumerate(node.inputs):
            if value is None or not isinstance(value.const_value, ir.ExternalTensor):
                continue
            size = value.const_value.length or 0
            table = place in ((0, 2, 3) if node.op_type in LOOK_UPS else (7, 8) if node.op_type == "GroupQueryAttention" else ())
            turned = node.op_type == "Cast" and all(user.op_type in LOOK_UPS for user in node.outputs[0].consumers())
            if turned:  # scales in half precision
                rows[str(value.name)] = 2 * size // int(value.const_value.shape[0])
            elif table:
                rows[str(value.name)] = size // int(value.const_value.shape[0])
            elif node.op_type == "Cast":
                widened[str(value.name)] = 2 * size
            else:
                whole[str(value.name)] = size
    return sum((rows | whole | widened).values())


def test_all_that_products_read_and_one_row_of_what_is_looked_up(exported: tuple[Path, Shape]) -> None:
    manifest = Manifest.read(exported[0])
    assert {variant.precision for variant in manifest.variants} == set(ALL)
    for variant in manifest.variants:
        for name, graph in variant.graphs.items():
            inline = variant.weight_bytes[name] - on_disk(exported[0] / graph)
            assert 0 <= inline < SMALL, (variant.precision, name, inline)


def test_fp32_against_the_number_of_weights(exported: tuple[Path, Shape]) -> None:
    folder, shape = exported
    sizes = next(variant.weight_bytes for variant in Manifest.read(folder).variants if variant.precision == "fp32")
    hidden, width = shape.hidden, shape.heads * shape.head_dim
    attention = 2 * hidden * width + 2 * hidden * shape.kv_heads * shape.head_dim
    for name, inner in (("router", 2 * hidden), ("expert0", 192), ("expert1", 192)):
        values = shape.vocab * hidden + attention + 3 * hidden * inner  # head and layer; the rest is small
        assert 0 <= sizes[name] - 4 * values < 4 * hidden * 12 + SMALL, name


def test_precisions_read_as_much_as_their_bits_say(exported: tuple[Path, Shape]) -> None:
    """Except half precision, which ONNX Runtime widens on loading."""
    read = {variant.precision: sum(variant.weight_bytes.values()) for variant in Manifest.read(exported[0]).variants}
    assert read["fp16"] == pytest.approx(read["fp32"], rel=0.02) and read["bf16"] == pytest.approx(read["fp32"], rel=0.02)
    assert read["int8"] == pytest.approx(read["fp32"] * 8.5 / 32, rel=0.1)
    assert read["int4"] < 0.7 * read["int8"]
