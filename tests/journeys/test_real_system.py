"""The pieces of benchmarks/real_system on a tiny base: data, adapters, router, bundles, results, tables."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.real_system import formats, library_code, math_problems, measure, report
from benchmarks.real_system.corpus import DOMAINS, EXPERTS, KINDS, prompts_of, write_preferences, write_sft
from benchmarks.real_system.mistakes import mistake
from benchmarks.real_system.readings import Readings
from benchmarks.real_system.tasks import draw
from benchmarks.real_system.workshop import Budget, Workshop
from fusionroute.fr_export.evaluation.lambdas import GRID
from fusionroute.runtime import FusionRuntime

TINY = Path(formats.__file__).parents[2] / "fr_export" / "tiny" / "llama3" / "router"


@pytest.mark.parametrize("domain", DOMAINS)
def test_tasks_are_right_by_their_own_checks_and_mistakes_are_not(domain: str) -> None:
    rng = random.Random(0)
    noticed = 0
    for _ in range(40):
        task = draw(KINDS[domain], "train", rng)
        assert task.right(task.answer) and task.split == "train"
        wrong = mistake(task, rng)
        noticed += wrong is not None
        assert wrong is None or not task.right(wrong)
    assert noticed > 30
    held_out = {split: prompts_of(domain, split, 25, 0) for split in ("validation", "test")}
    assert not {task.unit for task in held_out["test"]} & {task.unit for task in held_out["validation"]}
    assert len({task.prompt for task in held_out["test"]}) == 25


def test_checks_judge_what_was_asked_and_nothing_else() -> None:
    assert math_problems.last_number("1,000 - 1 = 999. The answer is 999.") == 999
    assert math_problems.last_number("none") is None
    assert library_code.same_line('return  "a"  # why', "return 'a'") and not library_code.same_line("return b", "return a")
    assert library_code.same_line("for x in  y:", "for x in y:") and library_code.same_line("else:", "else :")
    listed = formats._lines(2, r"\d+\. \S.*", numbered=True)
    assert listed("1. pear\n2. fig") and not listed("1. pear\n3. fig") and not listed("1. pear")
    assert formats._as_texts('{"a": 1}') == {"a": "1"} and formats._as_texts("[1]") is None


def test_files_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_sft(tmp_path / f"{name}.jsonl", {"math": 1.0, "instruction": 1.0}, 20, seed=3)
        write_preferences(tmp_path / f"{name}-pairs.jsonl", 20, seed=3)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (tmp_path / "a-pairs.jsonl").read_bytes() == (tmp_path / "b-pairs.jsonl").read_bytes()
    pair = json.loads((tmp_path / "a-pairs.jsonl").read_text().splitlines()[0])
    assert pair["chosen"] != pair["rejected"]


def test_methods_of_readings() -> None:
    """Two tasks, three tokens, two experts."""
    log_probs = np.log(np.random.default_rng(0).random((len(GRID), 2, 3), np.float32))
    readings = Readings(log_probs, log_probs > -0.5, np.array([1, 0, 1]), np.array([0, 0, 1]))
    half = GRID.index(0.5)
    assert readings.method("lambda:0.5")[0].tolist() == [log_probs[half, 1, 0], log_probs[half, 0, 1], log_probs[half, 1, 2]]
    assert readings.method("expert:1")[0].tolist() == log_probs[0, 1].tolist()
    assert readings.method("routed-once")[0].tolist() == [log_probs[0, 1, 0], log_probs[0, 1, 1], log_probs[0, 1, 2]]
    assert readings.method("oracle:0.5")[0].tolist() == log_probs[half].max(0).tolist()
    assert readings.method("random:0.5")[0] == pytest.approx(log_probs[half].mean(0))
    assert readings.per_task(np.array([1, 3, 5], np.float32)).tolist() == [2, 5]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Everything trained for two steps."""
    root = tmp_path_factory.mktemp("real")
    base = shutil.copytree(TINY, root / "base", ignore=shutil.ignore_patterns("routing_head*", "training.json", "fusion.json"))
    workshop = Workshop(str(base), root / "work", Budget(dict.fromkeys(EXPERTS, 2), sft=2, mixed=2))
    workshop.write_data()
    for name in EXPERTS:
        workshop.train_expert(name)
    workshop.train_router()
    return workshop


def test_the_system_is_trained_and_read(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (workshop.router / "adapter_config.json").is_file() and (workshop.router / "stages" / "sft").is_dir()
    monkeypatch.setattr(measure, "CONTEXT", 512)
    measurement = measure.Measurement(workshop, prompts=2, jobs=1)
    (workshop.folder / "results").mkdir()
    bundle = measurement.system("read", workshop.router, ("fp32",))
    readings = measurement.readings("read", bundle, "fp32", "test")["math"]
    # what is read is what the runtime's own scores say
    task = prompts_of("math", "test", 2, 0)[0]
    with FusionRuntime.load(bundle, "fp32", lam=0.5) as runtime:
        assert runtime.tokenizer is not None
        prompt = runtime.prompt_ids([{"role": "user", "content": task.prompt}])
        answer = [*runtime.tokenizer.encode(task.answer, special=False), runtime.bundle.manifest.eos_token_ids[0]]
        scores = runtime.score([*prompt, *answer])
    rows = scores.logits[len(prompt) - 1 : -1].astype(np.float64)
    expected = rows[np.arange(len(answer)), answer] - np.log(np.exp(rows).sum(-1))
    np.testing.assert_allclose(readings.method("lambda:0.5")[0][: len(answer)], expected, atol=1e-3)


@pytest.mark.slow
def test_every_piece_on_a_tiny_base(workshop: Workshop, tmp_path: Path) -> None:
    measurement = measure.Measurement(workshop, prompts=2, jobs=1)
    measurement.run()
    written = {path.name: path.stat().st_mtime_ns for path in (workshop.folder / "results").iterdir()}
    measurement.run()  # nothing is done twice
    assert written == {path.name: path.stat().st_mtime_ns for path in (workshop.folder / "results").iterdir()}
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nEnd.\n")
    report.write_tables(workshop.folder, page)
    text = page.read_text()
    assert text.startswith("# Title\n") and text.endswith("End.\n") and "old" not in text
    assert all(f"{name} expert" in text for name in EXPERTS) and "| int4 |" in text and "oracle" in text
