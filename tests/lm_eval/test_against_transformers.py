"""lm-evaluation-harness runs a bundle as it runs transformers' model of the same checkpoint.

Slow, in an environment of its own: `make test-lm-eval`.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from fusionroute.fr_export.families import FAMILIES
from tests.support.exporting import export_checkpoints
from tests.support.systems import Shape

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness has an environment of its own: make test-lm-eval")
TASKS = Path(__file__).parent / "tasks"
NAMES = ["fusionroute_choices", "fusionroute_answers", "fusionroute_texts"]


@pytest.fixture(scope="module")
def checkpoints() -> Any:
    return FAMILIES["gemma2"].preset("tiny")


@pytest.fixture(scope="module")
def bundle(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "gemma2"
    return export_checkpoints(out, Shape("gemma2"), checkpoints.router, dict(checkpoints.experts), ("fp32",))


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """As releases behind 0.4.13 do by themselves."""
    from lm_eval import models  # noqa: F401  registers the harness's own
    from lm_eval.api.registry import model_registry

    (entry,) = entry_points(group="lm_eval.models", name="fusionroute")
    model_registry.register("fusionroute", target=entry)


def run(model: str, arguments: str, tasks: list[str], **options: Any) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=tasks, task_manager=manager, device="cpu", log_samples=True, bootstrap_iters=0, **options
    )
    return results


def answers(results: dict[str, Any], task: str) -> list[Any]:
    """All numbers and texts that the model gave, in the order of the questions."""
    return flat([sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])])


def flat(response: Any) -> list[Any]:
    return [leaf for each in response for leaf in flat(each)] if isinstance(response, (list, tuple)) else [response]


@pytest.mark.parametrize(
    ("tasks", "length", "options"),
    [(NAMES, 1023, {}), (NAMES[::2], 24, {}), (NAMES[:2], 1023, {"apply_chat_template": True}), (NAMES[:1], 1023, {"num_fewshot": 2})],
    ids=["as they are", "in windows of 24 tokens", "chat template", "two examples before each"],
)
def test_the_router_alone_is_judged_as_transformers_judges_it(
    bundle: Path, checkpoints: Any, tasks: list[str], length: int, options: dict[str, Any]
) -> None:
    ours = run("fusionroute", f"bundle={bundle},precision=fp32,lam=1,threads=1,max_length={length}", tasks, **options)
    arguments = f"pretrained={checkpoints.router},dtype=float32,attn_implementation=eager,max_length={length}"
    theirs = run("hf", arguments, tasks, **options)
    for task in tasks:
        print(task, options, {name: (value, theirs["results"][task][name]) for name, value in ours["results"][task].items()})
        expected = [pytest.approx(each, abs=1e-4) if isinstance(each, float) else each for each in answers(theirs, task)]
        assert answers(ours, task) == expected
        for metric in {"acc,none", "exact_match,none"} & ours["results"][task].keys():
            assert ours["results"][task][metric] == theirs["results"][task][metric]


def test_the_command_runs_tasks(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fusionroute.fr_export.evaluation.harness", "--model", "fusionroute", "--include_path", str(TASKS)]
    command += ["--model_args", f"bundle={bundle},precision=fp32", "--tasks", NAMES[0], "--output_path", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert process.returncode == 0, process.stderr
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["results"][NAMES[0]]["acc,none"] > 0.9  # four choices
    assert results["config"]["experts"] == ["math", "code", "instruction"]
