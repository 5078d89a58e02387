"""The temporary bundle that generates the texts of a calibrating export."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fusionroute.calibration.record import NOBODY
from fusionroute.calibration.table import Table
from fusionroute.fr_export.bundle import recording
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.precision.calibrate import calibrate
from fusionroute.fr_export.verify.torch_reference import reference
from tests.support.adapters import make_adapted_system
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
        folder = arguments[4]()
        recorded_forms.extend(forms(graph) for graph in sorted(folder.glob("graphs/*.int?.onnx")))
        known = [*arguments]
        known[4] = lambda: folder
        return calibrate(*known, **named)

    monkeypatch.setattr(recording, "LARGE", limit)
    monkeypatch.setattr(recording, "calibrate", spied)
    out = export_checkpoints(tmp_path / "bundle", shape, router, experts, ("int4",), 64, calibration=str(prompts))
    assert recorded_forms == [recorded] * 3
    assert {block for bits, block in forms(out / "graphs" / "router.ort-cpu.int4.onnx") if bits == 4} == {64}
    assert len(Table.load(out / "calibration.safetensors").texts) == 1  # the other prompt is held out
    assert not (out / "recording").exists()


def test_a_system_with_one_base_records_with_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recorded choice is the one that torch makes of the whole text with the adapters merged."""
    shape = Shape(layers=1, heads=2, kv_heads=1, head_dim=16, hidden=32, tokenizer=True)
    _, router, experts = make_adapted_system(tmp_path, shape, [{"r": 2}, {"r": 2}, {"r": 3}])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two\nthree four\nfive six\nseven\n")
    graphs: list[str] = []

    def spied(*arguments: Any, **named: Any) -> Table:
        folder = arguments[4]()
        graphs.extend(path.name for path in folder.glob("graphs/*.int8.onnx"))
        known = [*arguments]
        known[4] = lambda: folder
        return calibrate(*known, **named)

    monkeypatch.setattr(recording, "calibrate", spied)
    out = export_checkpoints(tmp_path / "bundle", shape, router, experts, ("int8",), 64, calibration=str(prompts), shared_base=True)
    assert graphs == ["base.ort-cpu.int8.onnx"] and not (out / "recording").exists()
    texts = Table.load(out / "calibration.safetensors").texts
    references = reference(System.open(None, router, experts), [text.ids.tolist() for text in texts], (0.5, 0.5))
    assert len(texts) == 3
    for text, expected in zip(texts, references, strict=True):
        chosen = np.flatnonzero(text.experts != NOBODY)
        assert chosen.tolist() == list(range(chosen[0], len(text.ids) - 1))
        clear = np.abs(expected.routing[chosen, 0] - expected.routing[chosen, 1]) > 0.1  # rounding may turn others
        assert clear.mean() > 0.5 and np.array_equal(text.experts[chosen][clear], expected.experts[chosen][clear])
    assert {int(expert) for text in texts for expert in text.experts} == {NOBODY, 0, 1}
