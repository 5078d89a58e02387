"""Both families' trained systems, exported for TensorRT, on the simulated device: the very graphs, their orders and their tokens."""

from pathlib import Path
from unittest.mock import patch

import pytest
from rich.console import Console

from fr_export.export import Request, export
from fr_export.families import FAMILIES
from fr_export.stages import Stages
from runtime import FusionRuntime
from runtime.manifest import Manifest
from tests.simulated.bundles import add_engines
from tests.simulated.install import simulated
from tests.simulated.machine import Machine
from tests.simulated.plain import in_turn
from tests.simulated.tensorrt import WEIGHTS

CHUNK = 16  # so that prompts take several
RUNS = [("late", False, None), ("random", True, None), ("starved", False, None), ("random", False, WEIGHTS)]  # the last: experts evicted
PROMPTS = ("12+30= and then 7*8=", "def add(a, b):")


@pytest.fixture(scope="module", params=["gemma2", "llama3"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped system of a family in half precision and two quantisations."""
    family = FAMILIES[request.param]
    preset, out = family.preset("tiny"), tmp_path_factory.mktemp(request.param) / "bundle"
    assert preset.router
    wanted = Request(
        family,
        preset.router,
        dict(preset.experts),
        (family.half, "int8-wo", "int4"),
        ("tensorrt",),
        out,
        max_seq_len=192,
        calibration="none",
    )
    with patch("fr_export.export.measure", return_value=({}, "a test compares it")):
        export(wanted, Stages(Console(quiet=True)))
    return add_engines(out, CHUNK)


def test_tokens_are_those_of_the_graphs_run_in_turn(exported: Path) -> None:
    for precision in [variant.precision for variant in Manifest.read(exported).variants]:
        expected: dict[str, tuple[list[int], list[str]]] = {}
        for seed, (policy, integrated, budget) in enumerate(RUNS):
            with (
                patch("runtime.session.CHUNK", CHUNK),
                simulated(Machine(seed, policy, integrated)),
                FusionRuntime.load(exported, precision, "rtx", expert_memory=budget) as rt,
            ):
                for prompt in PROMPTS:
                    ids = rt.encode(prompt)
                    result = rt.generate(ids, 12)
                    if prompt not in expected:
                        expected[prompt] = in_turn(exported, ids, 12, CHUNK, precision)
                    tokens, experts = (part[: len(result.token_ids)] for part in expected[prompt])
                    assert (result.token_ids, result.experts) == (tokens, experts), (precision, policy, integrated)
                    if len(tokens) < 12:  # it ended, and rightly so
                        assert expected[prompt][0][len(tokens)] in rt.bundle.manifest.eos_token_ids
