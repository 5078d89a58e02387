"""The report of an export: sizes, differences from torch, stages, and what was not compared for which reason."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from rich.console import Console

from fusionroute.calibration.prompts import divide
from fusionroute.fr_export.bundle.targets import TARGETS
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.precision import SCHEMES, gptq
from fusionroute.fr_export.precision.blockwise import Format, Quantised
from fusionroute.fr_export.verify.bounds import misses, refuse_missed
from fusionroute.fr_export.verify.compare import DECODED, TOKENS, sequences
from fusionroute.fr_export.verify.hints import hint
from fusionroute.fr_export.verify.measure import obstacle
from fusionroute.fr_export.verify.report import show_report
from fusionroute.fr_export.verify.torch_reference import reference
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.precisions import PRECISIONS
from tests.support.exporting import ALL
from tests.support.packed_checkpoints import quantise
from tests.support.systems import Shape, make_system

PROMPTS = [
    "a prompt to calibrate on",
    "and another: 12+30=42",
    "one prompt of some length, so that there is something to compare on: 7 * 8 = 56",
]


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    folder = tmp_path_factory.mktemp("report")
    router, experts = make_system(folder, Shape("gemma2", experts=2, layers=1, tokenizer=True))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    return Request(FAMILIES["gemma2"], router, experts, ALL, ("ort:cpu",), folder / "bundle", lam=0.3, calibration=str(prompts), force=True)


def test_figures_are_those_of_an_independent_comparison(request_: Request) -> None:
    report = export(replace(request_, compare=TOKENS), Stages(Console(quiet=True)))
    bundle = Bundle.open(request_.out)
    bundle.verify()
    assert json.loads((request_.out / "report.json").read_text()) == report
    system = System.open(request_.family, request_.router, request_.experts)
    texts = sequences(system, divide(PROMPTS).held_out)
    expected = reference(system, texts, (0.3, 0.7))
    assert [entry["precision"] for entry in report["variants"]] == list(ALL)
    for entry in report["variants"]:
        with FusionRuntime.load(request_.out, precision=entry["precision"]) as runtime:
            assert runtime.lam == 0.3
            scores = [runtime.score(ids, chunk=1) for ids in texts]  # not in chunks, but for the end
            for whole, ids in zip(scores, texts, strict=True):
                alone = -(-DECODED * len(ids) // sum(map(len, texts)))
                whole.logits[:-alone] = runtime.score(ids).logits[:-alone]
        gaps = np.concatenate([np.abs(s.logits - e.logits) for s, e in zip(scores, expected, strict=True)])
        greedy = np.concatenate([s.logits.argmax(-1) == e.logits.argmax(-1) for s, e in zip(scores, expected, strict=True)])
        compared = entry["compared"]
        assert compared["tokens"] == sum(map(len, texts)) == len(gaps)
        assert compared["decode"]["max_difference"] == pytest.approx(gaps.max(), rel=1e-4)
        assert compared["decode"]["mean_difference"] == pytest.approx(gaps.mean(), rel=1e-4, abs=1e-8)
        assert compared["decode"]["greedy_agreement"] == pytest.approx(greedy.mean())
        ours, theirs = (torch.tensor(np.concatenate([one.logits for one in ones])).double().log_softmax(-1) for ones in (scores, expected))
        kl = torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        assert compared["decode"]["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-11)
        assert compared["decode"]["kl_p99"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-3, abs=1e-11)
        ends = np.cumsum([len(ids) for ids in texts]) - 1
        told = [row for row in range(len(gaps)) if row not in ends]
        following = torch.tensor([id for ids in texts for id in [*ids[1:], 0]])[told]
        perplexities = [float(torch.nn.functional.nll_loss(one[told], following).exp()) for one in (ours, theirs)]
        assert compared["decode"]["perplexity"] == pytest.approx(perplexities[0], rel=1e-5)
        assert compared["decode"]["perplexity_ratio"] == pytest.approx(perplexities[0] / perplexities[1], rel=1e-5)
        losses = [torch.nn.functional.nll_loss(one[told], following, reduction="none") for one in (ours, theirs)]
        error = float((losses[0] - losses[1]).std() / len(told) ** 0.5)
        assert compared["decode"]["perplexity_error"] == pytest.approx(error, rel=1e-3, abs=1e-7)
        best = theirs.topk(2).values
        sure = ((best[:, 0] - best[:, 1]) > 1).numpy()
        assert compared["decode"]["sure_positions"] == sure.sum() > 5
        assert compared["decode"]["sure_agreement"] == pytest.approx(greedy[sure].mean())
        assert compared["largest_logit"] == pytest.approx(max(np.abs(e.logits).max() for e in expected))
        assert (
            compared["decode"]["mean_difference"] < {"fp32": 1e-5, "fp16": 0.02, "bf16": 0.2, "int8": 0.3, "int4": 2.0}[entry["precision"]]
        )
    sizes = {entry["precision"]: entry["bytes"] for entry in report["variants"]}
    assert sizes["int8"] < 0.45 * sizes["fp32"] and sizes["fp16"] < 0.65 * sizes["fp32"]
    names = [stage["name"] for stage in report["stages"]]
    assert names[0] == "checking the checkpoints" and {"writing int8 for ort:cpu", "reference in torch", "comparing int8"} <= set(names)
    shown = io.StringIO()
    show_report(Console(file=shown, width=80), report, request_.out)
    assert "…" not in shown.getvalue(), "the table fits a terminal of 80 columns"
    assert all(stage["seconds"] >= 0 and stage["peak_anonymous_mib"] > 0 for stage in report["stages"])


def test_a_precision_that_misses_its_bound_is_told_and_strict_refuses_it(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    export(request_, Stages(Console(quiet=True)))
    before = (request_.out / "manifest.json").read_bytes()
    rounded = gptq.quantise

    def coarse(rows: np.ndarray, factor: gptq.Factor, fmt: Format, threads: int | None) -> Quantised:
        exact = rounded(rows, factor, fmt, threads)
        return Quantised(exact.values // 64 * 64, exact.scales, exact.zeros)  # as if six bits were lost

    monkeypatch.setattr("fusionroute.fr_export.precision.gptq_sequential.quantise", coarse)
    with pytest.raises(
        FusionError,
        match=r"^The precision int8 misses its bound \(.*routing agreement in chunks .*bound 98.00%.*\); .* without --strict\.$",
    ):
        export(replace(request_, strict=True), Stages(Console(quiet=True)))
    assert (request_.out / "manifest.json").read_bytes() == before
    assert [path.name for path in request_.out.parent.iterdir() if path.name.startswith(".")] == []
    report = export(replace(request_, precisions=("fp32", "int8")), Stages(Console(quiet=True)))
    assert [bool(entry["missed"]) for entry in report["variants"]] == [False, True]
    shown = io.StringIO()
    show_report(Console(file=shown, width=160, force_terminal=True, color_system="standard"), report, request_.out)
    assert "\x1b[31mint8 misses its bound: " in shown.getvalue()
    assert "To mend it, calibrate on more prompts of your own" in shown.getvalue()


MISSED = {"compared": {}, "missed": ["mean KL divergence token by token 0.05, bound 0.01"]}
ROUTED = [*MISSED["missed"], "routing agreement token by token 97.90%, bound 98.00%"]
HINTS = [
    ("ort:cpu", "int4", False, MISSED["missed"], "calibrate it by leaving out --calibration none"),
    ("ort:cpu", "int4", True, MISSED["missed"], "calibrate on more prompts of your own (--calibration FILE) or export int8 instead"),
    (
        "ort:cpu",
        "int4",
        True,
        ROUTED,
        "calibrate on more prompts of your own (--calibration FILE) or export int8 instead, since rounding turns",
    ),
    ("tensorrt", "int4", False, ROUTED, "calibrate it by leaving out --calibration none"),
    ("ort:cpu", "fp16", False, MISSED["missed"], "export fp32 instead"),
    ("ort:cuda", "bf16", False, MISSED["missed"], "leave it out"),
    ("ort:cpu", "fp32", False, MISSED["missed"], "report this fault with report.json, since fp32 rounds nothing"),
]


@pytest.mark.parametrize(("target", "precision", "calibrated", "missed", "words"), HINTS)
def test_what_to_try_first_where_a_bound_is_missed(target: str, precision: str, calibrated: bool, missed: list[str], words: str) -> None:
    entry = {"target": target, "precision": precision, "calibrated": calibrated, "missed": missed, "not_compared": None}
    assert hint(entry).startswith(words)
    with pytest.raises(FusionError, match=rf"^The precision {precision} misses its bound \(.*\); .*, or export without --strict\.$"):
        refuse_missed({"not_compared": None, "variants": [entry]})


@pytest.mark.parametrize(("ratio", "error", "chance"), [(1.013, 0.002, True), (1.016, 0.002, False), (1.013, None, False)])
def test_a_bound_that_is_missed_by_chance_asks_for_more_text(ratio: float, error: float | None, chance: bool) -> None:
    """Within two standard errors, and nothing else is missed."""
    good = {"greedy_agreement": 1.0, "sure_agreement": 1.0, "routing_agreement": 1.0, "kl_mean": 0.001, "perplexity_ratio": 1.001}
    compared = {"tokens": 384, "chunks": good | {"perplexity_ratio": ratio, "perplexity_error": error}, "decode": good}
    entry = {"target": "ort:cpu", "precision": "int8", "calibrated": True, "compared": compared, "not_compared": None}
    entry["missed"] = misses("ort:cpu", "int8", compared)
    assert entry["missed"] == [f"perplexity in chunks +{ratio - 1:.2%}{' ± 0.20%' if error else ''}, bound +1.00%"]
    assert hint(entry).startswith("compare on more text (--compare 3840)" if chance else "calibrate on more prompts")
    entry["missed"].append("mean KL divergence in chunks 0.05, bound 0.01")
    assert hint(entry).startswith("calibrate on more prompts")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_tables_fit_the_terminal_and_every_figure_is_whole(width: int) -> None:
    decode = {"perplexity_ratio": 1.1234, "kl_mean": 1.5e-3, "greedy_agreement": 0.9712, "routing_agreement": 0.9951}
    variants = [
        {
            "target": target, "precision": precision, "bytes": 1_813_857_592, "bits_per_weight": 8.125, "missed": ["top-1"] * missed,
            "compared": {"tokens": 384, "decode": decode}, "calibrated": True, "engines": [], "fitted": {}, "not_compared": None,
        }
        for target, precision, missed in (("ort:cpu", "fp32", 0), ("tensorrt:10.3", "int8-wo", 1))
    ]  # fmt: skip
    stages = [{"name": "writing int8-wo for tensorrt:10.3", "seconds": 12345.6, "peak_anonymous_mib": 12345.6}]
    sources = [{"model": "router", "kind": "adapter", "bytes": 1_234_567_890, "dtypes": ["BF16", "F32"], "notes": ["merged while read"]}]
    report: dict[str, Any] = {
        "family": "llama3", "models": ["router", "math"], "sources": sources, "approximated": {}, "variants": variants, "stages": stages, "not_compared": None,
    }  # fmt: skip
    shown = io.StringIO()
    show_report(Console(file=shown, width=width), report, Path("dist") / ("long" * 20))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    cells = shown.getvalue().split()
    for figure in ("1.81", "8.12", "+12.34%", "1.5e-03", "97.1%", "99.5%", "12345.6", "12,346", "fp32", "tensorrt:10.3", "int8-wo"):
        assert figure in cells


def test_bounds_are_told_from_both_sides() -> None:
    within = {"greedy_agreement": 0.95, "sure_agreement": None, "routing_agreement": 0.98, "perplexity_ratio": 1.01, "kl_mean": 0.01}
    assert misses("ort:cpu", "int8", {"chunks": within, "decode": within}) == [] == misses("ort:cpu", "int8", None)
    missed = within | {"routing_agreement": 0.979, "perplexity_ratio": 1.02}
    assert misses("ort:cpu", "int8", {"chunks": within, "decode": missed}) == [
        "routing agreement token by token 97.90%, bound 98.00%",
        "perplexity token by token +2.00%, bound +1.00%",
    ]
    assert misses("tensorrt", "int8", {"chunks": missed, "decode": missed}) == [], "activations in 8 bits too: bounded as w8a8"


def test_every_precision_has_a_record_and_every_record_a_scheme() -> None:
    assert {precision for schemes in SCHEMES.values() for precision in schemes} == set(PRECISIONS)


def test_a_single_prompt_is_noted_on_the_console_and_in_the_report(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusionroute.fr_export.export.measure", lambda *_: ({}, "another test compares it"))
    shown = io.StringIO()
    for prompts, notes in ((PROMPTS, []), (PROMPTS[:1], [divide(PROMPTS[:1]).note])):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        request = replace(request_, precisions=("fp32",), calibration=str(tmp_path / "prompts.txt"), out=tmp_path / "bundle")
        report = export(request, Stages(Console(file=shown, width=200)))
        assert report["notes"] == notes == json.loads((request.out / "report.json").read_text())["notes"]
        assert ("There is a single prompt, so the report is measured on the text of the calibration" in shown.getvalue()) == bool(notes)


def test_a_system_too_large_to_compare_says_so(request_: Request) -> None:
    with patch("fusionroute.fr_export.verify.measure.REFERENCE_LIMIT", 1000):
        report = export(request_, Stages(Console(quiet=True)))
        with pytest.raises(FusionError, match="could be compared"):
            export(replace(request_, strict=True), Stages(Console(quiet=True)))
    assert all(entry["compared"] is None and entry["missed"] == [] for entry in report["variants"])
    shown = io.StringIO()
    show_report(Console(file=shown, width=160), report, request_.out)
    assert "Not compared with torch" in shown.getvalue() and "in fp32, more than" in shown.getvalue()


def test_an_onnxruntime_that_is_too_old_for_a_graph_is_named_and_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime 1.23, the last for Python 3.10, reads opset 23: the comparison ended in an unexpected error."""
    assert obstacle("tensorrt") is None
    monkeypatch.setattr(TARGETS["tensorrt"].dialect, "OPSET", 99)
    assert str(obstacle("tensorrt")).endswith("which runs them for the comparison, does not read opset 99")


def test_the_report_says_what_each_model_was_made_from(request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionroute.fr_export.export.measure", lambda *_: ({}, "another test compares it"))
    expert = shutil.copytree(request_.experts["expert0"], tmp_path / "expert")
    quantise(expert, "gptq")
    request = replace(request_, experts=request_.experts | {"expert0": str(expert)}, precisions=("fp32", "int4"), calibration="none")
    shown = io.StringIO()
    report = export(replace(request, out=tmp_path / "bundle"), Stages(Console(file=shown, width=200)))
    sources = {source["model"]: source for source in report["sources"]}
    assert report["sources"] == json.loads((tmp_path / "bundle/report.json").read_text())["sources"]
    assert list(sources) == ["router", "expert0", "expert1"]
    assert sources["router"] | {"bytes": 0} == {"model": "router", "kind": "full", "bytes": 0, "dtypes": ["F32"], "notes": []}
    assert sources["expert0"]["bytes"] == (expert / "model.safetensors").stat().st_size < sources["expert1"]["bytes"]
    assert sources["expert0"]["dtypes"] == ["F16", "F32", "I32"]
    assert "expert0: it was quantised already (GPTQ, 7 matrices)" in shown.getvalue()
    assert [entry["fitted"] for entry in report["variants"]] == [{}, {"expert0": {"carried": 5}}]
    shown = io.StringIO()
    show_report(Console(file=shown, width=80), report, request.out)
    text = " ".join(shown.getvalue().split())
    assert "expert0: it was quantised already (GPTQ" in text and "int4 took over 5 matrices of quantised checkpoints" in text
