"""Outcomes: their files, their parts, and choosing among experts' answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fusionroute.fr_export.evaluation import Outcomes, load_results, save_results
from fusionroute.fr_export.evaluation.outcomes import joined
from fusionroute.fr_export.evaluation.questions import FileQuestion, digest, read_questions
from fusionroute.fr_export.evaluation.sequence import first_routed, most_likely
from fusionroute.fr_export.evaluation.token_classes import CLASSES
from fusionroute.runtime import InputError

EXPERTS = ["math", "code"]


def outcomes(answers: list[str], logprobs: list[float], expert: int = 0, questions: str = "digest") -> Outcomes:
    count = len(answers)
    counts = np.zeros((count, len(EXPERTS), len(CLASSES)), np.int32)
    counts[:, expert, 0] = [len(answer) for answer in answers]
    correct = np.array([answer == "right" for answer in answers])
    return Outcomes(
        questions, EXPERTS, answers, correct, correct.astype(np.float32), np.array(logprobs, np.float32),
        counts.sum((1, 2)).astype(np.int32), np.full(count, expert, np.int16), counts,
    )  # fmt: skip


def same(first: Outcomes, second: Outcomes) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in Outcomes.__dataclass_fields__)


MATH = outcomes(["right", "wrong", "42 ≠ 43", ""], [-0.1, -2.0, -0.5, -1.0])
CODE = outcomes(["no", "right", "x", "y"], [-0.2, -0.3, -0.5, -0.9], expert=1)


def test_the_most_likely_answer_wins() -> None:
    selected = most_likely([MATH, CODE])
    assert selected.answers == ["right", "right", "42 ≠ 43", "y"]  # the first among equals
    assert selected.accuracy == 0.5
    assert selected.first.tolist() == [0, 1, 0, 1]
    assert selected.counts.sum((0, 2)).tolist() == [5 + 7, 5 + 1]
    assert selected.logprob.tolist() == pytest.approx([-0.1, -0.3, -0.5, -0.9])


def test_the_router_chooses_an_answer() -> None:
    fused = outcomes(["a"] * 4, [0.0] * 4).rows(range(4))
    fused.first[:] = [1, 0, 1, 0]
    assert first_routed([MATH, CODE], fused).answers == ["no", "wrong", "x", ""]


def test_answers_to_other_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="different prompts"):
        most_likely([MATH, outcomes(["a"] * 4, [0.0] * 4, questions="other")])
    questions = [FileQuestion("1+1=", "2")]
    assert len({digest(questions, False), digest(questions, True), digest([FileQuestion("1+1=", "3")], False)}) == 3


def test_rows_and_joined_are_inverse() -> None:
    assert same(joined([MATH.rows([0, 1]), MATH.rows([2, 3])]), MATH)


def test_files(tmp_path: Path) -> None:
    results = {"expert:math": {"d": MATH}, "fused": {"d": CODE, 'other "d"': MATH}}
    save_results(tmp_path / "x.npz", results)
    loaded = load_results(tmp_path / "x.npz")
    assert [(method, list(domains)) for method, domains in loaded.items()] == [(m, list(d)) for m, d in results.items()]
    assert all(same(loaded[m][d], one) for m, domains in results.items() for d, one in domains.items())
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    (tmp_path / "text").write_text("no results")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:300])
    for name in ("nothing.npz", "text", "other.npz", "cut.npz"):
        with pytest.raises(InputError, match=rf"{name} is no file of evaluation results \(.*evaluate again"):
            load_results(tmp_path / name)


def test_question_files(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    lines = [f'{{"prompt": "{n}+1=", "answer": "{n + 1}", "domain": "{"even" if n % 2 == 0 else "odd"}", "more": 1}}' for n in range(20)]
    path.write_text("\n".join(lines) + "\n\n")
    questions = read_questions(path, 100, 0)
    assert {domain: len(own) for domain, own in questions.items()} == {"even": 10, "odd": 10}
    assert questions["odd"][1] == FileQuestion("3+1=", "4")
    fewer = read_questions(path, 4, 0)
    assert fewer == read_questions(path, 4, 0) != read_questions(path, 4, 1)
    assert all(len(own) == 4 and list(own) == [q for q in questions[domain] if q in own] for domain, own in fewer.items())


BROKEN = {
    "no JSON": ("{", "tasks.jsonl:2 is no JSON, since it ends too early: expected one object per line."),
    "no object": ("[]", 'tasks.jsonl:2 lacks a string "prompt"'),
    "no answer": ('{"prompt": "a", "domain": "b"}', "tasks.jsonl:2 lacks"),
    "a number": ('{"prompt": "a", "answer": 2, "domain": "b"}', "tasks.jsonl:2 lacks"),
    "empty prompt": ('{"prompt": "", "answer": "2", "domain": "b"}', "tasks.jsonl:2 has an empty prompt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_question_files(tmp_path: Path, name: str) -> None:
    line, words = BROKEN[name]
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "a", "answer": "", "domain": "b"}\n' + line)
    with pytest.raises(InputError) as caught:
        read_questions(path, 5, 0)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_question_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, words in (("empty", "holds no prompts"), ("bytes", "not UTF-8"), ("nothing", "No such file"), (".", "directory")):
        with pytest.raises(InputError, match=words):
            read_questions(tmp_path / name, 5, 0)
