"""Keys and values in 8 and 4 bits: what is stored, what it takes, and that every way to read a text answers alike."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from rich.console import Console

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.manifest import Manifest
from tests.support.rounded_caches import fused
from tests.support.speculation import draft_always, same
from tests.support.systems import Shape, make_system

PROMPTS = ["12+30=", "def f(x):", "Es war einmal", "a", "What is the colour of the sky?"]
LENGTH = 96
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Case:
    system: System
    bundles: dict[str, Path]  # precision of keys and values → bundle, in fp32 and int8


@pytest.fixture(scope="module", params=["gemma2", "llama3"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("kv")
    router, experts = make_system(folder, Shape(request.param, layers=2, experts=2, tokenizer=True))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    bundles = {}
    for kv in ("fp32", "int8", "int4"):
        asked = Request(
            FAMILIES[request.param], router, experts, ("fp32", "int8"), ("ort:cpu",), folder / kv,
            max_seq_len=LENGTH, calibration=str(prompts), kv=kv,
        )  # fmt: skip
        with patch("fusionroute.fr_export.export.measure", return_value=({}, "a test compares it")):
            export(asked, Stages(Console(quiet=True)))
        bundles[kv] = asked.out
    return Case(System.open(FAMILIES[request.param], router, experts, max_seq_len=LENGTH), bundles)


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_logits_are_those_of_torch_with_rounded_keys_and_values(case: Case, kv: str) -> None:
    manifest = Manifest.read(case.bundles[kv])
    variant = next(each for each in manifest.variants if each.precision == "fp32")
    ids = np.random.default_rng(0).integers(3, case.system.vocab_size, 60).tolist()
    expected, routing = fused(case.system, [case.bundles[kv] / variant.graphs[each.name] for each in manifest.models], BITS[kv], ids)
    for chunk in (256, 7, 1):
        with FusionRuntime.load(case.bundles[kv], "fp32", "cpu") as rt:
            scores = rt.score(ids, chunk=chunk)
        # a value between two steps falls to either side by the last bit
        np.testing.assert_allclose(scores.routing, routing, atol=0.02 * np.abs(routing).max())
        close = np.abs(scores.logits - expected).max(-1) <= 0.02 * np.abs(expected).max()
        assert close.mean() > 0.9, np.abs(scores.logits - expected).max(-1) / np.abs(expected).max()
