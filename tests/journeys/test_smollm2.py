"""A real model: SmolLM2-135M as router and as three perturbed experts. Slow.

The checkpoints come from FUSIONROUTE_SMOLLM2, a folder with router/ and experts/, or else from scripts beside the
repository.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fusionroute.calibration.prompts import BUILTIN
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.verify.torch_reference import reference
from fusionroute.runtime import FusionRuntime
from tests.support.exporting import ALL, export_checkpoints
from tests.support.parity import check_parity
from tests.support.paths import REPOSITORY
from tests.support.systems import Shape

pytestmark = pytest.mark.slow
TOOLS = REPOSITORY.parent / "shared/tools"
TEXT = "\n\n".join(BUILTIN)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    named = os.environ.get("FUSIONROUTE_SMOLLM2")
    root = Path(named) if named else tmp_path_factory.mktemp("smollm2") / "system"
    if not named:
        if not TOOLS.is_dir():
            pytest.skip("no SmolLM2: set FUSIONROUTE_SMOLLM2 to a folder with router/ and experts/")
        pytest.importorskip("gguf", reason="making SmolLM2 needs gguf and accelerate")
        subprocess.run([sys.executable, TOOLS / "smollm2.py", root.parent / "model"], check=True)
        subprocess.run([sys.executable, TOOLS / "fusion_system.py", root.parent / "model", root], check=True)
    return str(root / "router"), {path.name: str(path) for path in sorted((root / "experts").iterdir())}


@pytest.fixture(scope="module")
def bundle(checkpoints: tuple[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoints(tmp_path_factory.mktemp("smollm2") / "bundle", Shape(), *checkpoints, ALL, max_seq_len=1024)


@pytest.fixture(scope="module")
def system(checkpoints: tuple[str, dict[str, str]]) -> System:
    return System.open(FAMILIES["llama3"], *checkpoints, max_seq_len=1024)


def text_ids(bundle: Path, count: int) -> list[int]:
    with FusionRuntime.load(bundle) as runtime:
        return (runtime.encode(TEXT) * 4)[:count]


def test_fp32_is_torch(bundle: Path, system: System) -> None:
    """Experts lag by hundreds of tokens: the greedy run starts after 300 that most of them have not read."""
    check_parity(bundle, system, text_ids(bundle, 400), prompt=300)


@pytest.mark.parametrize(
    ("precision", "greedy", "routing", "kl"), [("fp16", 0.995, 0.995, 1e-4), ("bf16", 0.97, 0.97, 5e-3), ("int8", 0.93, 0.97, 0.02)]
)
def test_quantised(precision: str, greedy: float, routing: float, kl: float, bundle: Path, system: System) -> None:
    ids = text_ids(bundle, 300)
    (expected,) = reference(system, [ids], (0.5, 0.5))
    target = log_softmax(expected.logits)
    with FusionRuntime.load(bundle, precision=precision) as runtime:
        for chunk in (512, 1):
            scores = runtime.score(ids, chunk=chunk)
            top = float((scores.logits.argmax(-1) == expected.logits.argmax(-1)).mean())
            routed = float((scores.experts == expected.experts).mean())
            divergence = float((np.exp(target) * (target - log_softmax(scores.logits))).sum(-1).mean())
            print(f"{precision}, chunks of {chunk}: greedy {top:.1%}, routing {routed:.1%}, mean KL {divergence:.2g}")
            assert top >= greedy and routed >= routing and divergence <= kl


def log_softmax(rows: np.ndarray) -> np.ndarray:
    exact = rows.astype(np.float64)
    exact -= exact.max(-1, keepdims=True)
    return np.asarray(exact - np.log(np.exp(exact).sum(-1, keepdims=True)))
