"""The temporary bundle that generates the texts of a calibrating export."""

from pathlib import Path
from typing import Any

import onnx
import pytest

from fusionroute.calibration.table import Table
from fusionroute.fr_export.bundle import recording
from fusionroute.fr_export.precision.calibrate import calibrate
from tests.support.exporting import export_checkpoints
from tests.support.systems import Shape, make_system


def forms(graph: Path) -> set[tuple[int, int]]:
    """The (bits, block size) of all products of a graph."""
    nodes = [node for node in onnx.load(graph, load_external_data=False).graph.node if node.op_type == "MatMulNBits"]
    read = [{attribute.name: attribute.i for attribute in node.attribute} for node in nodes]
    return {(attributes["bits"], attributes["block_size"]) for attributes in read}


@pytest.mark.parametrize(("limit", "recorded"), [(recording.LARGE, set()), (0, {(4, 128)})], ids=["small", "large"])
def test_recording(limit: int, recorded: set[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small systems record in 8 bits by row, large ones at 4 bits in large blocks, which need least memory.

    The exported bundle has its own blocks.
    """
    shape = Shape(layers=1, experts=2, hidden=128, tokenizer=True)
    router, experts = make_system(tmp_path, shape)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two\nthree four\n")
    recorded_forms: list[set[tuple[int, int]]] = []

    def spied(*arguments: Any, **named: Any) -> Table:
        recorded_forms.extend(forms(graph) for graph in sorted(arguments[3].glob("graphs/*.int?.onnx")))
        return calibrate(*arguments, **named)

    monkeypatch.setattr(recording, "LARGE", limit)
    monkeypatch.setattr(recording, "calibrate", spied)
    out = export_checkpoints(tmp_path / "bundle", shape, router, experts, ("int4",), 64, calibration=str(prompts))
    assert recorded_forms == [recorded] * 3
    assert {block for bits, block in forms(out / "graphs" / "router.ort-cpu.int4.onnx") if bits == 4} == {64}
    assert len(Table.load(out / "calibration.safetensors").texts) == 1  # the other prompt is held out
    assert not (out / "recording").exists()
