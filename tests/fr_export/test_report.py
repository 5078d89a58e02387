"""The report of an export says what is true: sizes, differences from torch, stages; and what was not compared, and why."""

import io
import json
from unittest.mock import patch

import numpy as np
import pytest
from rich.console import Console

from fr_export.compare import sequences
from fr_export.export import Request, export
from fr_export.families import FAMILIES
from fr_export.reference import reference
from fr_export.report import show_report
from fr_export.stages import Stages
from fr_export.system import System
from runtime import FusionRuntime
from runtime.bundle import Bundle
from tests.exporting import ALL
from tests.systems import Shape, make_system

PROMPTS = ["one prompt of some length, so that there is something to compare on", "and another: 12+30=42"]


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    folder = tmp_path_factory.mktemp("report")
    router, experts = make_system(folder, Shape("gemma2", experts=2, layers=1, tokenizer=True))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    return Request(FAMILIES["gemma2"], router, experts, ALL, ("ort:cpu",), folder / "bundle", lam=0.3, calibration=str(prompts), force=True)


def test_figures_are_those_of_an_independent_comparison(request_: Request) -> None:
    report = export(request_, Stages(Console(quiet=True)))
    bundle = Bundle.open(request_.out)
    bundle.verify()
    assert json.loads((request_.out / "report.json").read_text()) == report
    system = System.open(request_.family, request_.router, request_.experts)
    texts = sequences(system, PROMPTS)
    expected = reference(system, texts, (0.3, 0.7))
    assert [entry["precision"] for entry in report["variants"]] == list(ALL)
    for entry in report["variants"]:
        with FusionRuntime.load(request_.out, precision=entry["precision"]) as runtime:
            assert runtime.lam == 0.3
            scores = [runtime.score(ids, chunk=1) for ids in texts]
        gaps = np.concatenate([np.abs(s.logits - e.logits) for s, e in zip(scores, expected, strict=True)])
        greedy = np.concatenate([s.logits.argmax(-1) == e.logits.argmax(-1) for s, e in zip(scores, expected, strict=True)])
        found = entry["compared"]
        assert found["tokens"] == sum(map(len, texts)) == len(gaps)
        assert found["decode"]["max_difference"] == pytest.approx(gaps.max(), rel=1e-4)
        assert found["decode"]["mean_difference"] == pytest.approx(gaps.mean(), rel=1e-4)
        assert found["decode"]["greedy_agreement"] == pytest.approx(greedy.mean())
        assert found["largest_logit"] == pytest.approx(max(np.abs(e.logits).max() for e in expected))
        assert found["decode"]["max_difference"] < {"fp32": 1e-4, "fp16": 0.1, "int8": 3.0}[entry["precision"]]
    sizes = {entry["precision"]: entry["bytes"] for entry in report["variants"]}
    assert sizes["int8"] < 0.45 * sizes["fp32"] and sizes["fp16"] < 0.65 * sizes["fp32"]
    names = [stage["name"] for stage in report["stages"]]
    assert names[0] == "checking the checkpoints" and {"writing int8 for ort:cpu", "reference in torch", "comparing int8"} <= set(names)
    shown = io.StringIO()
    show_report(Console(file=shown, width=80), report, request_.out)
    assert "…" not in shown.getvalue(), "the table fits a terminal of 80 columns"
    assert all(stage["seconds"] >= 0 and stage["peak_anonymous_mib"] > 0 for stage in report["stages"])


def test_a_system_too_large_to_compare_says_so(request_: Request) -> None:
    with patch("fr_export.export.REFERENCE_LIMIT", 1000):
        report = export(request_, Stages(Console(quiet=True)))
    assert all(entry["compared"] is None for entry in report["variants"])
    shown = io.StringIO()
    show_report(Console(file=shown, width=160), report, request_.out)
    assert "Not compared with torch" in shown.getvalue() and "in fp32, more than" in shown.getvalue()
