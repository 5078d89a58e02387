"""`python -m fr_export.evaluate` on the shipped system: numbers, files and pictures, tuning, wrong usage."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusionroute.fr_export.commands import evaluate as module
from fusionroute.fr_export.commands.main import run as run_verb
from fusionroute.fr_export.evaluation import lambdas
from fusionroute.fr_export.tasks.domains import draw_many
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.manifest import Manifest
from tests.support.commands import Command, Ended, in_folder
from tests.support.paths import REPOSITORY


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    with in_folder("evaluate", lambda: run_verb("evaluate"), tmp_path, monkeypatch, capsys) as run:
        yield run


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def test_what_it_measures_and_writes(shipped_bundle: Path, command: Command, tmp_path: Path) -> None:
    options = ("--domains", "math,code", "--prompts", 6, "--jobs", 1)
    ended = command(
        shipped_bundle, *options, "--json", "--methods", "fused,experts,sequence", "--sweep-lambda", "--lambda", 0.4, "--seed", 3
    )
    assert ended.status == 0
    out = tmp_path / "evaluation"
    report = json.loads(ended.out)
    assert report == json.loads((out / "results.json").read_text())
    assert report["settings"] == {"tasks": "builtin test", "chat": False, "seed": 3, "lambda": 0.4, "fusion": None}
    assert sorted(path.name for path in out.iterdir()) == ["accuracy.png", "lambda.png", "results.json", "routing.png"]
    assert all(is_png(path) for path in out.glob("*.png"))
    methods = ["fused", "expert:math", "expert:code", "expert:instruction", "sequence"]
    assert [(row["bundle"], row["precision"], row["method"]) for row in report["rows"]] == [("gemma2", "fp32", name) for name in methods]
    right: dict[str, list[bool]] = {}
    with FusionRuntime.load(shipped_bundle, "fp32") as rt:
        for domain in ("math", "code"):
            for sample in draw_many(domain, "test", 6, 3):
                for name, choice in (("fused", {"lam": 0.4}), ("expert:code", {"expert": "code", "lam": 0.0})):
                    right.setdefault(f"{name} {domain}", []).append(rt.generate(sample.prompt, 64, **choice).text == sample.answer)
    for row in report["rows"]:
        for domain in ("math", "code"):
            scores = row["domains"][domain]
            if f"{row['method']} {domain}" in right:
                expected = right[f"{row['method']} {domain}"]
                assert scores["accuracy"]["value"] == pytest.approx(sum(expected) / 6)
            assert scores["prompts"] == 6 and scores["accuracy"]["low"] <= scores["accuracy"]["value"] <= scores["accuracy"]["high"]
            assert sum(row["routing"]["domains"][domain].values()) == pytest.approx(1)
        average = sum(row["domains"][domain]["accuracy"]["value"] for domain in ("math", "code")) / 2
        assert row["average"]["accuracy"]["value"] == pytest.approx(average)
    first, other = report["rows"][0], report["rows"][1]
    assert first["against_first"] is None
    difference = other["average"]["accuracy"]["value"] - first["average"]["accuracy"]["value"]
    assert other["against_first"]["difference"] == pytest.approx(difference)
    assert other["routing"]["domains"]["code"]["math"] == 1.0
    curve = dict(report["lambda_curves"]["gemma2 fp32"])
    assert list(curve) == list(lambdas.GRID)
    assert curve[0.4] == pytest.approx(first["average"]["accuracy"]["value"])

    ended = command(shipped_bundle, *options, "--methods", "expert:math,fused")
    assert ended.status == 0
    assert [path.name for path in sorted(out.iterdir())] == ["accuracy.png", "results.json", "routing.png"], "an old curve is not left"
    lines = [line.split() for line in ended.out.splitlines()]
    assert [line[2] for line in lines if line[:1] == ["gemma2"]] == ["expert:math", "fused"] * 2
    assert "200/200" not in ended.out


def test_tuning_writes_lambda_into_the_bundle(
    shipped_bundle: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(shipped_bundle, tmp_path / "tuned"))
    monkeypatch.setattr(lambdas, "GRID", (0.0, 0.3, 1.0))
    monkeypatch.setattr(lambdas.methods, "__defaults__", (lambdas.GRID,))
    monkeypatch.setattr(lambdas.curve, "__defaults__", (lambdas.GRID,))
    options = ("--domains", "math,composite", "--prompts", 8, "--jobs", 1, "--methods", "fused", "--json")
    ended = command(bundle, *options, "--tune")
    assert ended.status == 0
    manifest = Manifest.read(bundle)
    Bundle.open(bundle).verify()
    averages = []
    with FusionRuntime.load(bundle, "fp32") as rt:
        assert rt.lam == manifest.lam
        for lam in (0.0, 0.3, 1.0):
            shares = []
            for domain in ("math", "composite"):
                samples = draw_many(domain, "validation", 8, 0)
                shares.append(sum(rt.generate(s.prompt, 64, lam=lam).text == s.answer for s in samples) / 8)
            averages.append(sum(shares) / 2)
    assert manifest.lam_curve is not None
    assert [lam for lam, _ in manifest.lam_curve] == [0.0, 0.3, 1.0]
    assert [value for _, value in manifest.lam_curve] == pytest.approx(averages)
    assert manifest.lam == lambdas.best(manifest.lam_curve) and manifest.lam < 1
    report = json.loads(ended.out)
    assert report["lambda_curves"] == {"tuned fp32, for tuning": [list(point) for point in manifest.lam_curve]}
    again = json.loads(command(bundle, *options, "--lambda", manifest.lam).out)
    assert again["rows"] == report["rows"], "what follows is measured with the λ that was chosen"


def test_it_needs_no_torch() -> None:
    """Neither the command nor any module of the evaluation: all are imported here, as a run and its workers do."""
    script = """
import sys
from importlib import import_module
from pkgutil import iter_modules
import fusionroute.fr_export.commands.evaluate, fusionroute.fr_export.evaluation as evaluation
names = [module.name for module in iter_modules(evaluation.__path__) if module.name != "harness"]  # that is another program's
assert {"run", "worker", "study", "methods", "scoring", "report"} <= set(names), names
for name in names:
    import_module(f"{evaluation.__name__}.{name}")
print(*sorted({"torch", "transformers", "onnx", "onnx_ir"} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert run.stdout.split() == []


def test_the_best_lambda() -> None:
    assert lambdas.best([(0.0, 0.1), (0.4, 0.3), (1.0, 0.2)]) == 0.4
    assert lambdas.best([(0.0, 0.3), (0.3, 0.1 + 0.2), (0.6, 0.3), (1.0, 0.2)]) == 0.6  # nearest to one half
    assert lambdas.best([(0.4, 0.3), (0.6, 0.3)]) == 0.4


def test_tasks_from_a_file_in_chat(shipped_bundle: Path, command: Command, tmp_path: Path) -> None:
    lines = [{"prompt": f"{n}+1=", "answer": str(n + 1), "domain": "sums"} for n in range(5)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    ended = command(shipped_bundle, "--tasks", "tasks.jsonl", "--methods", "fused", "--chat", "--jobs", 1, "--out", "deep/er", "--json")
    assert ended.status == 0
    (row,) = json.loads(ended.out)["rows"]
    with FusionRuntime.load(shipped_bundle) as rt:
        right = [rt.generate([{"role": "user", "content": line["prompt"]}], 16).text == line["answer"] for line in lines]
    assert row["domains"]["sums"]["accuracy"]["value"] == pytest.approx(sum(right) / 5)
    assert row["domains"]["sums"]["bleu"] is None and row["average"]["bleu"] is None, "numbers are no texts"
    assert (tmp_path / "deep" / "er" / "results.json").is_file()


USAGE: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "no bundle": ((), ("Missing argument 'BUNDLE",)),
    "method": (("BUNDLE", "--methods", "fused,best"), ("Unknown method 'best'", "expert:math", "--methods")),
    "no such expert": (("BUNDLE", "--methods", "expert:history"), ("Unknown method 'expert:history'",)),
    "lambda of a method": (("BUNDLE", "--methods", "lambda:2"), ("'lambda:2' is no method",)),
    "domain": (("BUNDLE", "--domains", "history"), ("unknown domain 'history'", "math, code, instruction")),
    "split": (("BUNDLE", "--split", "train"), ("'train' is not one of 'test', 'validation'",)),
    "fusion": (("BUNDLE", "--fusion", "product"), ("'product' is not one of 'weighted', 'additive'",)),
    "lambda": (("BUNDLE", "--lambda", "2"), ("--lambda",)),
    "lambda that is none": (("BUNDLE", "--lambda", "nan"), ("--lambda",)),
    "prompts": (("BUNDLE", "--prompts", "0"), ("--prompts",)),
    "jobs": (("BUNDLE", "--jobs", "0"), ("--jobs",)),
    "tuning with a lambda": (("BUNDLE", "--tune", "--lambda", "0.5"), ("--tune",)),
    "unknown flag": (("BUNDLE", "--colour"), ("--colour",)),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_has_status_2(shipped_bundle: Path, command: Command, name: str, tmp_path: Path) -> None:
    arguments, words = USAGE[name]
    ended = command(*(shipped_bundle if argument == "BUNDLE" else argument for argument in arguments))
    assert ended.status == 2 and ended.out == "" and not any(tmp_path.iterdir())
    shown = " ".join(ended.err.replace("│", " ").split())
    for word in words:
        assert word in shown


FAILURES: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "no bundle": (("nowhere",), ("no bundle at nowhere", "export.py")),
    "second bundle": (("BUNDLE", "nowhere"), ("no bundle at nowhere",)),
    "precision": (("BUNDLE", "--precision", "int3"), ("no precision 'int3'", "--precision int3")),
    "second precision": (("BUNDLE", "--precision", "fp32,int8"), ("no precision 'int8'",)),
    "no file": (("BUNDLE", "--tasks", "tasks.jsonl"), ("tasks.jsonl cannot be read", "No such file")),
    "out is a file": (("BUNDLE", "--out", "BUNDLE/manifest.json"), ("manifest.json", "File exists")),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_end_in_one_sentence(shipped_bundle: Path, command: Command, name: str, tmp_path: Path) -> None:
    arguments, words = FAILURES[name]
    given = tuple(str(argument).replace("BUNDLE", str(shipped_bundle)) for argument in arguments)
    assert_one_sentence(command(*given, "--prompts", 1), *words)
    assert not any(tmp_path.iterdir())


def assert_one_sentence(ended: Ended, *words: str) -> None:
    assert ended.status == 1 and ended.out == ""
    assert ended.err.startswith("error: ") and ended.err.endswith(".\n") and ended.err.count("\n") == 1, ended.err
    for word in words:
        assert word in ended.err


def test_additive_bundles_have_no_lambda_to_tune(shipped_bundle: Path, command: Command, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(shipped_bundle, tmp_path / "bundle"))
    Manifest.read(bundle).model_copy(update={"fusion": "additive"}).write(bundle)
    assert_one_sentence(command(bundle, "--tune", "--prompts", 1), "fuses additively", "--fusion weighted")


@pytest.mark.parametrize("package", ["matplotlib", "sacrebleu"])
def test_a_missing_package_names_the_extra(shipped_bundle: Path, command: Command, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else object())
    assert_one_sentence(command(shipped_bundle), f"'{package}'", "pip install 'fusionroute[train]'")


def raising(error: BaseException) -> Any:
    def fails(*_: object, **__: object) -> None:
        raise error

    return fails


def test_faults_and_interrupts(shipped_bundle: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = (shipped_bundle, "--prompts", 1, "--domains", "math", "--methods", "fused", "--jobs", 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "run", raising(RuntimeError("two\nlines")))
        assert_one_sentence(command(*few), "unexpectedly", "RuntimeError: two lines", "--debug")
        ended = command(*few, "--debug")
        assert ended.status == 1 and "Traceback" in ended.err
        patch.setattr(module, "run", raising(KeyboardInterrupt()))
        assert_one_sentence(command(*few), "Interrupted")
    with monkeypatch.context() as patch:
        patch.setattr("fusionroute.runtime.files.Path.replace", raising(OSError(28, "No space left on device", "evaluation/accuracy.png")))
        ended = command(*few)
        assert ended.status == 1 and "No space left on device): make room, or name another disk with --out." in ended.err
    assert list((tmp_path / "evaluation").iterdir()) == []
