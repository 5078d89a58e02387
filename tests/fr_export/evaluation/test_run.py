"""`evaluate`: the outcomes of all methods, however many processes; nothing is computed twice or left running."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionroute.fr_export.evaluation import Outcomes, Results, evaluate, pool
from fusionroute.fr_export.evaluation.questions import FileQuestion, Questions
from fusionroute.fr_export.evaluation.run import SLACK
from fusionroute.runtime import BundleError, FusionError, FusionRuntime, InputError, UnavailableError
from fusionroute.runtime.stream import StreamOptions
from tests.support.paths import REPOSITORY

METHODS = ["fused", "sequence", "sequence-routed", "collab"]
ALONE = [f"expert:expert{number}" for number in range(3)]


@pytest.fixture(scope="module")
def questions(random_bundle: Path) -> Questions:
    """The references are what the runtime answers, for half of the prompts, so that some are right."""
    with FusionRuntime.load(random_bundle, "fp32") as rt:
        lines = [FileQuestion(prompt, rt.generate(prompt, 6).text) for prompt in ("1+1=", "sun", "[3, 2]")]
    return {
        "sums": [*lines, FileQuestion("2+2=", "4"), FileQuestion("9", "x y")],
        "words": [FileQuestion(f"word {n}", "abc") for n in range(20)],
    }


@pytest.fixture(scope="module")
def results(random_bundle: Path, questions: Questions) -> Results:
    return evaluate(random_bundle, "fp32", METHODS, questions, jobs=1)


def rows(outcomes: Outcomes) -> list[Any]:
    return [getattr(outcomes, name) for name in Outcomes.__dataclass_fields__]


def equal(first: Results, second: Results) -> bool:
    return all(
        np.array_equal(a, b)
        for method, domains in first.items()
        for domain, outcomes in domains.items()
        for a, b in zip(rows(outcomes), rows(second[method][domain]), strict=True)
    )


def test_outcomes_are_those_of_the_runtime(random_bundle: Path, questions: Questions, results: Results) -> None:
    assert list(results) == [*METHODS, *ALONE]
    with FusionRuntime.load(random_bundle, "fp32") as rt:
        assert rt.tokenizer is not None
        for domain, own in questions.items():
            limit = SLACK + max(len(rt.tokenizer.encode(question.answer, special=False)) for question in own)
            options_of: dict[str, StreamOptions] = {"fused": {}, "expert:expert1": {"expert": "expert1", "lam": 0.0}}
            for method, options in options_of.items():
                outcomes = results[method][domain]
                expected = [rt.generate(question.prompt, limit, **options) for question in own]
                assert outcomes.answers == [one.text for one in expected]
                assert outcomes.correct.tolist() == [one.text == q.answer for one, q in zip(expected, own, strict=True)]
                assert outcomes.tokens.tolist() == [len(one.token_ids) for one in expected]
                for row, one in enumerate(expected):
                    assert outcomes.counts[row].sum(-1).tolist() == [one.experts.count(name) for name in rt.expert_names]
                assert [rt.expert_names[first] for first in outcomes.first] == [one.experts[0] for one in expected]


def test_sequences_are_whole_answers_of_one_expert(results: Results, questions: Questions) -> None:
    for domain, own in questions.items():
        alone = [results[name][domain] for name in ALONE]
        for row in range(len(own)):
            best = max(range(3), key=lambda n: float(alone[n].logprob[row]))
            assert results["sequence"][domain].answers[row] == alone[best].answers[row]
            assert results["sequence-routed"][domain].answers[row] == alone[results["fused"][domain].first[row]].answers[row]


def test_known_results_are_not_computed_again(
    random_bundle: Path, questions: Questions, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    answer_all = pool.answer_all

    def noted(job: Any, *arguments: Any) -> Any:
        decoded.append(job.methods)
        return answer_all(job, *arguments)

    monkeypatch.setattr("fusionroute.fr_export.evaluation.run.answer_all", noted)
    assert equal(results, evaluate(random_bundle, "fp32", METHODS, questions, jobs=1, known=results)) and decoded == []
    known = {name: results[name] for name in ALONE}
    assert equal(results, evaluate(random_bundle, "fp32", METHODS, questions, jobs=1, known=known)) and decoded == [("fused", "collab")]
    fewer = {domain: own[:3] for domain, own in questions.items()}
    assert len(evaluate(random_bundle, "fp32", ["fused"], fewer, jobs=1, known=results)["fused"]["words"]) == 3
    evaluate(random_bundle, "fp32", ["fused"], questions, jobs=1, known=results, chat=True)
    assert decoded[1:] == [("fused",), ("fused",)]


def test_processes_give_what_one_gives(
    random_bundle: Path, questions: Questions, results: Results, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fusionroute.fr_export.evaluation.run.PIECE", 4)
    assert equal(results, evaluate(random_bundle, "fp32", METHODS, questions, jobs=2))
    with pytest.raises(InputError, match=r"The prompt has \d+ tokens.*context of 64"):
        evaluate(random_bundle, "fp32", ["fused"], {"long": [FileQuestion("a", "b"), FileQuestion("too long " * 20, "b")] * 3}, jobs=2)
    assert capsys.readouterr() == ("", "")


def test_options_reach_the_methods(random_bundle: Path, questions: Questions) -> None:
    words = {"words": questions["words"][:4]}
    results = evaluate(random_bundle, "int8", ["fused", "lambda:0.2"], words, jobs=1, lam=0.2)
    assert results["fused"]["words"].answers == results["lambda:0.2"]["words"].answers
    assert results["fused"]["words"].answers != evaluate(random_bundle, "int8", ["fused"], words, jobs=1)["fused"]["words"].answers
    chat = evaluate(random_bundle, "fp32", ["fused"], words, jobs=1, chat=True, fusion="additive")["fused"]["words"]
    with FusionRuntime.load(random_bundle, "fp32", fusion="additive") as rt:
        message = [{"role": "user", "content": words["words"][2].prompt}]
        assert chat.answers[2] == rt.generate(message, 3 + SLACK).text
    assert chat.questions != results["fused"]["words"].questions


def without(bundle: Path, folder: Path, name: str) -> Path:
    """A copy of a bundle that lacks a file."""
    from fusionroute.runtime.manifest import Manifest

    copy = Path(shutil.copytree(bundle, folder / name))
    manifest = Manifest.read(copy)
    manifest.model_copy(update={"files": {path: file for path, file in manifest.files.items() if path != name}}).write(copy)
    (copy / name).unlink()
    return copy


BAD: dict[str, tuple[dict[str, Any], type[FusionError], str]] = {
    "method": ({"methods": ["fused", "best"]}, InputError, "Unknown method 'best'"),
    "precision": ({"precision": "int3"}, UnavailableError, "no precision 'int3'"),
    "bundle": ({"bundle": "nowhere"}, BundleError, "no bundle at nowhere"),
    "domain": ({"questions": {"sums": []}}, InputError, "The domain 'sums' has no prompts"),
    "jobs": ({"jobs": 0}, InputError, "jobs=0 is out of range"),
    "lambda": ({"lam": 1.5}, InputError, "lam=1.5"),
    "fusion": ({"fusion": "product"}, InputError, "'product'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(random_bundle: Path, name: str) -> None:
    change, kind, words = BAD[name]
    arguments: dict[str, Any] = {
        "bundle": random_bundle,
        "precision": "fp32",
        "methods": ["fused"],
        "questions": {"sums": [FileQuestion("1", "1")]},
    } | change
    with pytest.raises(kind, match=words):
        evaluate(**arguments)


def test_bundles_without_texts(random_bundle: Path, tmp_path: Path) -> None:
    for name, chat in (("tokenizer.json", False), ("chat_template.jinja", True)):
        with pytest.raises(UnavailableError, match=f"has no {name}"):
            evaluate(without(random_bundle, tmp_path, name), "fp32", ["fused"], {"sums": [FileQuestion("1", "1")]}, chat=chat)


ENDLESS = """
import signal
import sys
from fusionroute.fr_export.evaluation.pool import answer_all
from fusionroute.fr_export.evaluation.worker import Job, Piece
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs, such as some CI runs, inherit it ignored
    piece = Piece("", tuple((f"{n}", "abc") for n in range(4)), 40)
    job = Job(sys.argv[1], "fp32", ("fused",), None, None, False)
    answer_all(job, [piece] * 10_000, 2, lambda count: print("working", flush=True))
"""


def members(group: int) -> dict[int, bytes]:
    """Processes of a group that still run, and their command lines."""
    commands = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, own = path.read_text().rpartition(") ")[2].split()[:3]
            if int(own) == group and state != "Z":
                commands[int(path.parent.name)] = (path.parent / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
    return commands


def wait_for(condition: Callable[[], object]) -> bool:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


@pytest.mark.parametrize("how", ["ctrl-c", "killed parent", "killed worker"])
def test_nothing_is_left_running(random_bundle: Path, tmp_path: Path, how: str) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, script, random_bundle], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=environment
    ) as process:

        def workers() -> list[int]:
            return [pid for pid, command in members(process.pid).items() if b"spawn_main" in command]

        try:
            assert process.stdout is not None and process.stderr is not None
            assert wait_for(lambda: len(workers()) == 2)
            assert process.stdout.readline() == b"working\n"
            if how == "ctrl-c":
                os.killpg(process.pid, signal.SIGINT)
            else:
                os.kill(process.pid if how == "killed parent" else workers()[0], signal.SIGKILL)
            assert wait_for(lambda: not members(process.pid))
            assert process.wait() != 0
            said = process.stderr.read()
            assert said.count(b"KeyboardInterrupt") == (how == "ctrl-c"), "the workers leave it to their parent"
            assert (b"A process of the evaluation was killed" in said) == (how == "killed worker")
        finally:
            for left in members(process.pid):
                os.kill(left, signal.SIGKILL)
