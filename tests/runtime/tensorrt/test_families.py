"""Both families' trained systems, exported for TensorRT, on the simulated device: graphs, orders and tokens."""

from pathlib import Path
from unittest.mock import patch

import pytest
from rich.console import Console

from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.precision import SCHEMES
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.manifest import Manifest
from tests.support.simulated.bundles import add_engines
from tests.support.simulated.install import simulated
from tests.support.simulated.machine import Machine
from tests.support.simulated.plain import in_turn
from tests.support.simulated.tensorrt import WEIGHTS
from tests.support.systems import SHIPPED

CHUNK = 16  # so that prompts take several
# the last: experts evicted
RUNS = [("late", False, None), ("random", True, None), ("starved", False, None), ("random", False, WEIGHTS)]
PROMPTS = ("12+30= and then 7*8=", "def add(a, b):")


def exported(name: str, folder: Path, precisions: tuple[str, ...], calibration: str, target: str = "tensorrt") -> Path:
    """The shipped system of a family, with engines that the simulated library runs."""
    preset, out = FAMILIES[name].preset("tiny"), folder / "bundle"
    assert preset.router
    request = Request(
        FAMILIES[name], preset.router, dict(preset.experts), precisions, (target,), out, max_seq_len=192, calibration=calibration
    )
    with patch("fusionroute.fr_export.export.measure", return_value=({}, "a test compares it")):
        export(request, Stages(Console(quiet=True)))
    return add_engines(out, CHUNK)


@pytest.mark.parametrize("name", SHIPPED)
def test_tokens_are_those_of_the_graphs_run_in_turn(name: str, tmp_path: Path) -> None:
    check(exported(name, tmp_path, (FAMILIES[name].half, "int4"), "none"))


@pytest.mark.parametrize("name", SHIPPED)
def test_rows_that_the_runtime_appends_give_the_same_tokens(name: str, tmp_path: Path) -> None:
    """Engines for TensorRT 10.3 give new keys and values only."""
    check(exported(name, tmp_path, (FAMILIES[name].half,), "none", "tensorrt:10.3"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_all_precisions_calibrated(name: str, tmp_path: Path) -> None:
    check(exported(name, tmp_path, tuple(SCHEMES["tensorrt"]), "builtin"))


def check(bundle: Path) -> None:
    """In every precision, order and kind of memory, two prompts give what they must."""
    for precision in [variant.precision for variant in Manifest.read(bundle).variants]:
        expected: dict[str, tuple[list[int], list[str]]] = {}
        for seed, (policy, integrated, budget) in enumerate(RUNS):
            with (
                patch("fusionroute.runtime.limits.CHUNK", CHUNK),
                simulated(Machine(seed, policy, integrated)),
                FusionRuntime.load(bundle, precision, "rtx", expert_memory=budget) as rt,
            ):
                for prompt in PROMPTS:
                    ids = rt.encode(prompt)
                    result = rt.generate(ids, 12)
                    if prompt not in expected:
                        expected[prompt] = in_turn(bundle, ids, 12, CHUNK, precision)
                    tokens, experts = (part[: len(result.token_ids)] for part in expected[prompt])
                    assert (result.token_ids, result.experts) == (tokens, experts), (precision, policy, integrated)
                    if len(tokens) < 12:  # it ended, and rightly so
                        assert expected[prompt][0][len(tokens)] in rt.bundle.manifest.eos_token_ids
