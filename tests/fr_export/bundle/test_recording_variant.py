"""One graph for the calibration texts of models of one base: each reads as if it had a graph of its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fusionroute.calibration.side_by_side import ReadTogether, SideBySide
from fusionroute.fr_export.bundle.recording_variant import recording_variant
from fusionroute.fr_export.bundle.shared_base import deltas
from fusionroute.fr_export.bundle.variant import VariantWriter
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.graphs.batch_dimension import batched
from fusionroute.fr_export.graphs.traces import Traces
from fusionroute.fr_export.precision.fp32 import Fp32
from fusionroute.runtime.manifest import Variant
from tests.support.adapters import make_adapted_system
from tests.support.systems import Shape

CAPACITY = 40
SYSTEMS: dict[str, tuple[Shape, list[dict[str, Any]]]] = {
    "llama3": (Shape(layers=2), [{"r": 2, "target_modules": ["q_proj", "down_proj"]}, {"r": 4}, {"r": 3, "target_modules": ["v_proj"]}]),
    "norms": (Shape("gemma2", layers=2), [{"r": 2}, {"r": 4, "modules_to_save": ["input_layernorm", "norm"]}, {"r": 1}]),
    "biases": (Shape("qwen2", layers=1), [{"r": 2}, {"r": 4, "bias": "all"}, {"r": 2}]),
}


def read(folder: Path, variant: Variant, names: list[str], rows: int) -> list[np.ndarray]:
    """The logits of all models and the routing in each of some steps over random texts of different lengths."""
    places: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        places.setdefault(variant.graphs[name], []).append(number)
    graphs = [ReadTogether(folder / path, batched(folder / path), numbers) for path, numbers in places.items()]
    draw, answers = np.random.default_rng(0), []
    with SideBySide(graphs, CAPACITY, rows) as models:
        assert models.rows == rows
        lengths = np.array([3, 11, 1, 7][:rows], np.int32)
        for row, length in enumerate(lengths):
            models.begin(row, draw.integers(3, 300, length).tolist())
        for step in range(6):
            if step == 3:  # another text takes the row of one that has ended
                lengths[1] = 2
                models.begin(1, [5, 9])
            every = models.read(draw.integers(3, 300, rows), lengths)
            answers += [np.array(own[0]) for own in every] + [np.array(every[0][1])]
            lengths += 1
    return answers


@pytest.mark.parametrize("kind", SYSTEMS)
def test_models_in_one_batch_answer_as_models_alone(kind: str, tmp_path: Path) -> None:
    shape, options = SYSTEMS[kind]
    _, router, experts = make_adapted_system(tmp_path, shape, options)
    system = System.open(None, router, experts, max_seq_len=CAPACITY)
    stages = Stages(Console(quiet=True))
    traces, names = Traces(system, stages), [model.name for model in system.models]
    together = recording_variant(system, deltas(system), traces, Fp32(), tmp_path / "together", stages)
    assert len(set(together.graphs.values())) == 1 and list(together.graphs) == names
    whole = VariantWriter(system, traces, {}, tmp_path / "whole", stages, windows=False).write("ort:cpu", Fp32()).variant
    answers, expected = (read(tmp_path / name, variant, names, 4) for name, variant in (("together", together), ("whole", whole)))
    for own, theirs in zip(answers, expected, strict=True):
        assert np.abs(own - theirs).max() <= 2e-5 * np.abs(theirs).max()
    logits = expected[: len(names)]
    assert all(np.abs(one - other).max() > 0.05 for n, one in enumerate(logits) for other in logits[:n]), "models differ"


def test_experts_that_no_factors_make_have_graphs_of_their_own(tmp_path: Path) -> None:
    shape, options = SYSTEMS["llama3"]
    _, router, experts = make_adapted_system(tmp_path, shape, options)
    system, stages = System.open(None, router, experts, max_seq_len=CAPACITY), Stages(Console(quiet=True))
    own = deltas(system)
    del own["expert0"]
    variant = recording_variant(system, own, Traces(system, stages), Fp32(), tmp_path / "apart", stages)
    assert variant.graphs["router"] == variant.graphs["expert1"] != variant.graphs["expert0"]
    answers = read(tmp_path / "apart", variant, ["router", "expert0", "expert1"], 3)
    assert np.abs(answers[1] - answers[2]).max() > 0.05
