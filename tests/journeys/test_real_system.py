"""The pieces of benchmarks/real_system on a tiny base: data, adapters, router, bundles, results, tables."""

import json
import random
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from rich.progress import Progress

from benchmarks.real_system import formats, library_code, math_problems, report
from benchmarks.real_system.corpus import DOMAINS, EXPERTS, KINDS, prompts_of, write_preferences, write_sft
from benchmarks.real_system.measure import Measurement
from benchmarks.real_system.mistakes import mistake
from benchmarks.real_system.readings import Readings, read
from benchmarks.real_system.tasks import draw
from benchmarks.real_system.workshop import Budget, Workshop
from fusionroute.fr_export.evaluation.lambdas import GRID
from fusionroute.fr_export.training.router import Router
from fusionroute.runtime import FusionRuntime
from tests.fr_export.training.conftest import TEMPLATE
from tests.support.exporting import export_checkpoints
from tests.support.systems import Shape, make_model, make_system

SHAPE = Shape(heads=2, kv_heads=1, head_dim=16, hidden=32, layers=1, experts=2, tokenizer=True, config={"max_position_embeddings": 2048})
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


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A random model of one layer, whose template ends every turn."""
    folder = make_model(tmp_path / "base", SHAPE, 0, expert=False)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_experts_are_trained_once_and_go_on_where_they_stopped(base: Path, tmp_path: Path) -> None:
    workshop = Workshop(str(base), tmp_path / "work", Budget({"math": 2}, sft=1, mixed=1))
    write_sft(workshop.folder / "data" / "math.jsonl", {"math": 1.0}, 12, seed=0)
    workshop.train_expert("math")
    adapter = Path(workshop.experts["math"]) / "adapter_model.safetensors"
    assert json.loads(adapter.with_name("adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    written = adapter.stat().st_mtime_ns
    workshop.train_expert("math")
    assert adapter.stat().st_mtime_ns == written
    # a run that was interrupted before its first checkpoint
    unfinished = workshop.folder / "experts" / "math.unfinished"
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "load", Mock(side_effect=KeyboardInterrupt))
        shutil.rmtree(adapter.parent)
        workshop.train_expert("math")
    assert (unfinished / "run.json").is_file()
    workshop.train_expert("math")
    assert adapter.is_file() and not unfinished.exists()


def test_what_is_read_is_what_the_runtime_scores(tmp_path: Path) -> None:
    router, experts = make_system(tmp_path, SHAPE)
    bundle = export_checkpoints(tmp_path / "bundle", SHAPE, router, experts, ("fp32",))
    task = prompts_of("instruction", "test", 1, 0)[0]
    with Progress(disable=True) as progress:
        readings = read(bundle, "fp32", [task, task], progress)
    for lam in (0.0, 0.5, 1.0):
        with FusionRuntime.load(bundle, "fp32", lam=lam) as runtime:
            assert runtime.tokenizer is not None
            prompt = runtime.prompt_ids([{"role": "user", "content": task.prompt}])
            answer = [*runtime.tokenizer.encode(task.answer, special=False), runtime.bundle.manifest.eos_token_ids[0]]
            scores = runtime.score([*prompt, *answer])
        rows = scores.logits[len(prompt) - 1 : -1].astype(np.float64)
        expected = rows[np.arange(len(answer)), answer] - np.log(np.exp(rows).sum(-1))
        log_probs, hits = readings.method(f"lambda:{lam}")
        np.testing.assert_allclose(log_probs[: len(answer)], expected, atol=1e-4)
        assert (hits[: len(answer)] == (rows.argmax(-1) == answer)).all()
        assert (readings.chosen[: len(answer)] == scores.experts[len(prompt) - 1 : -1]).all()
    assert readings.per_task(log_probs)[0] == pytest.approx(expected.mean(), abs=1e-4)


@pytest.mark.slow
def test_every_piece_on_a_tiny_base(tmp_path: Path) -> None:
    base = shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("routing_head*", "training.json", "fusion.json"))
    workshop = Workshop(str(base), tmp_path / "work", Budget(dict.fromkeys(EXPERTS, 2), sft=2, mixed=2))
    workshop.write_data()
    for name in EXPERTS:
        workshop.train_expert(name)
    workshop.train_router()
    workshop.train_direct()
    assert (workshop.router / "adapter_config.json").is_file() and (workshop.router / "stages" / "sft").is_dir()
    measurement = Measurement(workshop, prompts=2, jobs=1)
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
