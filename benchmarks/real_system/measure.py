"""Exports the system and the baselines, and measures every method: by reading right answers, and by answering."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.real_system.corpus import DOMAINS, EXPERTS, prompts_of
from benchmarks.real_system.readings import Readings, read
from benchmarks.real_system.tasks import Split, Task
from benchmarks.real_system.workshop import Workshop
from fusionroute.fr_export.checkpoints.hub import locate
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.evaluation.lambdas import GRID
from fusionroute.fr_export.evaluation.outcomes import Outcomes, load_results, save_results
from fusionroute.fr_export.evaluation.run import evaluate
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.training.init_router import init_router
from fusionroute.fr_export.training.merge.models import merge

PRECISIONS = ("fp32", "int8", "int4")
METHODS = ("fused", "token", "router", *(f"expert:{name}" for name in EXPERTS), "collab", "sequence", "sequence-routed")
MERGE_SCALE = 0.5  # of the summed differences from the base: a third of each would be the average
CONTEXT = 1024


@dataclass(frozen=True)
class Measurement:
    """All results are files below the workshop's folder, written where they are missing."""

    workshop: Workshop
    prompts: int  # per domain
    jobs: int

    @property
    def folder(self) -> Path:
        """Where results lie."""
        return self.workshop.folder / "results"

    @cached_property
    def base(self) -> str:
        """The base's folder."""
        return str(locate(self.workshop.base))

    def run(self) -> None:
        """Everything, the most important first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        system = self.system("system", self.workshop.router, PRECISIONS)
        lam = self.tuned(system)
        for precision in PRECISIONS:
            self.readings("system", system, precision, "test")
        self.answers("system", system, "fp32", METHODS, lam)
        sft = self.system("sft", self.workshop.router / "stages" / "sft", ("fp32",))
        self.readings("sft", sft, "fp32", "test")
        self.answers("sft", sft, "fp32", ("fused",), lam)
        for precision in PRECISIONS[1:]:
            self.answers("system", system, precision, ("fused",), lam)
        singles = {"base": self.base, "average": self.merged("average"), "task_arithmetic": self.merged("task_arithmetic")}
        if self.workshop.direct.exists():
            singles["direct"] = str(self.workshop.direct)
        for name, model in singles.items():
            self.answers(name, self.alone(name, model), "fp32", ("router",), lam)

    def tasks(self, split: Split) -> dict[str, list[Task]]:
        """The prompts of a split by domain: half as many to tune on as to test on."""
        return {domain: prompts_of(domain, split, self.prompts if split == "test" else -(-self.prompts // 2), seed=0) for domain in DOMAINS}

    def tuned(self, bundle: Path) -> float:
        """The λ under which the right answers of the validation split are likeliest, as a mean over domains."""
        file = self.folder / "lambda.json"
        if not file.exists():
            readings = self.readings("system", bundle, "fp32", "validation")
            curve = [float(np.mean([r.per_task(r.method(f"lambda:{lam}")[0]).mean() for r in readings.values()])) for lam in GRID]
            file.write_text(json.dumps({"lam": GRID[int(np.argmax(curve))], "curve": list(zip(GRID, curve, strict=True))}))
        return float(json.loads(file.read_text())["lam"])

    def readings(self, name: str, bundle: Path, precision: str, split: Split) -> dict[str, Readings]:
        """The readings of every domain, one file each."""
        readings = {}
        for domain, tasks in self.tasks(split).items():
            file = self.folder / f"{name}.{precision}.{split}.{domain}.readings.npz"
            if not file.exists():
                with Progress(console=Console(stderr=True)) as progress:
                    read(bundle, precision, tasks, progress).save(file)
            readings[domain] = Readings.load(file)
        return readings

    def answers(self, name: str, bundle: Path, precision: str, methods: Sequence[str], lam: float) -> None:
        """Answers to the test prompts by some methods, checked by each task's own check; one file per domain."""
        for domain, tasks in self.tasks("test").items():
            file = self.folder / f"{name}.{precision}.{domain}.answers.npz"
            if not file.exists():
                console = Console(stderr=True)
                results = evaluate(bundle, precision, methods, {domain: tasks}, jobs=self.jobs, lam=lam, chat=True, console=console)
                save_results(file, {method: {domain: checked(own[domain], tasks)} for method, own in results.items()})

    def system(self, name: str, router: Path, precisions: tuple[str, ...]) -> Path:
        """The bundle of a router with the experts."""
        return self._bundle(name, router, self.workshop.experts, precisions)

    def alone(self, name: str, model: str) -> Path:
        """The bundle of one model, as the router of a system whose expert never runs."""
        headed = self.workshop.folder / "alone" / name
        if not headed.exists():
            init_router(model, 1, headed, seed=None, base=self.base)
        return self._bundle(name, headed, {"unused": self.workshop.experts[EXPERTS[0]]}, ("fp32",))

    def merged(self, method: str) -> str:
        """The folder of the experts merged into one model."""
        out = self.workshop.folder / "merged" / method
        if not out.exists():
            merge(method, self.base, list(self.workshop.experts.values()), out, scale=MERGE_SCALE)
        return str(out)

    def _bundle(self, name: str, router: Path, experts: Mapping[str, str], precisions: tuple[str, ...]) -> Path:
        out = self.workshop.folder / "bundles" / name
        if not out.exists():
            request = Request(
                None, str(router), dict(experts), precisions, ("ort:cpu",), out, max_seq_len=CONTEXT, base=self.base
            )  # fmt: skip
            display = Stages(Console(stderr=True))
            with display.progress:
                export(request, display)
        return out


def checked(outcomes: Outcomes, tasks: Sequence[Task]) -> Outcomes:
    """The same answers, right where the task's own check says so instead of where they equal its answer."""
    right = [task.right(answer) for task, answer in zip(tasks, outcomes.answers, strict=True)]
    return replace(outcomes, correct=np.array(right))


def loaded(folder: Path, name: str, precision: str) -> dict[str, dict[str, Outcomes]]:
    """Method → domain → outcomes of what `answers` wrote; empty where nothing is there."""
    results: dict[str, dict[str, Outcomes]] = {}
    for domain in DOMAINS:
        file = folder / f"{name}.{precision}.{domain}.answers.npz"
        if file.exists():
            for method, own in load_results(file).items():
                results.setdefault(method, {}).update(own)
    return results
