"""The paper's comparison on small systems: train every method, export it, measure it through the runtime.

Writes docs/results.md.

python -m benchmarks.paper --family gemma2 --work DIR               about two hours on one core; files already in DIR are reused
python -m benchmarks.paper --family gemma2 --work DIR --width 64    half the width, with fewer methods: how the gain changes with size
python -m benchmarks.paper --work DIR --report                      writes docs/results.md and its pictures from the files in DIR
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.paper.results import TEST_DRAW, write_results
from benchmarks.paper.routing_choices import choices
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.evaluation import lambdas
from fusionroute.fr_export.evaluation.outcomes import Results, load_results, save_results
from fusionroute.fr_export.evaluation.run import evaluate
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES as EXPORTED
from fusionroute.fr_export.tasks.domains import ALL_DOMAINS, DOMAINS, Sample, draw_many
from fusionroute.fr_export.tiny.architectures import ARCHITECTURES, WIDTH
from fusionroute.fr_export.tiny.ship import SEEDS, chosen, tuned, validation
from fusionroute.fr_export.tiny.workshop import BUDGETS, Workshop
from fusionroute.fr_export.training.merge.models import merge

PRECISIONS = ("fp32", "fp16", "int8")
SCALES = (0.3, 0.5, 0.8)  # of the merged task vectors
TEST = 5000  # prompts per domain
READ = 1000  # prompts per domain whose right answers are read to see the routing


class Comparison:
    """One family at one width.

    Checkpoints, bundles and results are files in the work folder, written when they are missing.
    """

    def __init__(self, family: str, work: Path, width: int, prompts: int, scale: float, jobs: int):
        self.folder = work / f"{family}-{width}"
        self.workshop = Workshop(ARCHITECTURES[family], self.folder, width, BUDGETS[family].scaled(scale))
        self.family, self.jobs = EXPORTED[family], jobs
        self.validation = validation()
        self.test = {domain: draw_many(domain, "test", prompts, TEST_DRAW) for domain in ALL_DOMAINS}

    def core(self, extra: Sequence[str]) -> None:
        """FusionRoute and direct fine-tuning, of every seed."""
        for seed in SEEDS:
            self.workshop.router(seed)
        for seed in SEEDS:
            self.workshop.direct(seed)
        shared: Results = {}  # results that do not depend on the router
        for seed in SEEDS:
            results = self.system(f"system-{seed}", self.workshop.router(seed), extra, shared)
            shared = {method: domains for method, domains in results.items() if method == "collab" or method.startswith("expert:")}
        for seed in SEEDS:
            self.single(f"direct-{seed}", self.workshop.direct(seed))

    def run(self) -> None:
        """Everything, the most important first."""
        self.core(("lambda:0.5", "token", "router", "collab", "sequence", "sequence-routed", *(f"expert:{name}" for name in DOMAINS)))
        for seed in SEEDS:
            self.system(f"sft-{seed}", self.workshop.router(seed) / "stages" / "sft", (), {})
        self.merges()
        self.precisions()
        self.routing()
        self.single("base", self.workshop.base())
        for seed in SEEDS:
            self.single(f"direct-sft-{seed}", self.workshop.direct(seed) / "stages" / "sft")

    def precisions(self) -> None:
        """The shipped system, which is the best of the seeds on the validation split, in every precision."""
        tuned_at = {seed: FusionSettings.read(self.folder / f"system-{seed}.fusion") for seed in SEEDS}
        best = chosen(tuned_at)
        bundle = self.bundle("shipped", self.workshop.router(best), self.workshop.expert_folders, PRECISIONS)
        for precision in PRECISIONS:
            self.measured(f"shipped.{precision}", bundle, ("fused",), self.test, {}, precision, tuned_at[best].lam)

    def routing(self) -> None:
        """Which experts the routers choose at the tokens that not every expert gets right."""
        for seed in SEEDS:
            file = self.folder / f"system-{seed}.choices.npz"
            if not file.exists():
                tasks = {domain: samples[:READ] for domain, samples in self.test.items()}
                choices(str(self.folder / "bundles" / f"system-{seed}"), tasks).save(file)

    def system(self, name: str, router: Path, extra: Sequence[str], known: Results) -> Results:
        """Tune λ on the validation split, then measure the test split."""
        bundle = self.bundle(name, router, self.workshop.expert_folders, ("fp32",))
        settings = tuned(self.measured(f"{name}.validation", bundle, lambdas.methods(), self.validation))
        (self.folder / f"{name}.fusion").mkdir(exist_ok=True)
        settings.write(self.folder / f"{name}.fusion")
        return self.measured(name, bundle, ("fused", *extra), self.test, known, "fp32", settings.lam)

    def single(self, name: str, model: Path, split: str = "test") -> Results:
        """Measure a model alone: as the router of a system whose expert never runs."""
        headed = self.folder / "alone" / name
        if not headed.exists():
            shutil.copytree(model, headed, ignore=shutil.ignore_patterns("stages"))
            width = json.loads((headed / "config.json").read_text())["hidden_size"]
            save_file({"routing_head.weight": torch.zeros(1, width)}, headed / "routing_head.safetensors")
        bundle = self.bundle(name, headed, {"unused": self.workshop.expert_folders["math"]}, ("fp32",))
        tasks = self.test if split == "test" else self.validation
        return self.measured(name if split == "test" else f"{name}.{split}", bundle, ("router",), tasks)

    def merges(self) -> None:
        """Plain average; task arithmetic and DARE at the scale that is best on the validation split."""
        base, experts = self.workshop.base(), [Path(folder) for folder in self.workshop.expert_folders.values()]
        self.single("average", self.merged("average", base, experts))
        for method in ("task_arithmetic", "dare"):
            tried = {scale: self.single(f"{method}-{scale}", self.merged(method, base, experts, scale), "validation") for scale in SCALES}
            best = max(SCALES, key=lambda scale: mean(tried[scale]["router"]))
            (self.folder / f"{method}.scale.json").write_text(
                json.dumps({"scale": best, "curve": {s: mean(r["router"]) for s, r in tried.items()}})
            )
            outcome = self.single(f"{method}-{best}", self.merged(method, base, experts, best))
            save_results(self.folder / f"{method}.npz", outcome)

    def merged(self, method: str, base: Path, experts: Sequence[Path], scale: float = 1.0) -> Path:
        """The folder of a merged model."""
        out = self.folder / "merged" / f"{method}-{scale}"
        if not out.exists():
            merge(method, base, experts, out, scale=scale, drop=0.5, seed=0)
        return out

    def bundle(self, name: str, router: Path, experts: Mapping[str, str], precisions: tuple[str, ...]) -> Path:
        """The bundle of a system, exported if it is missing."""
        out = self.folder / "bundles" / name
        if not out.exists():
            export(Request(self.family, str(router), dict(experts), precisions, ("ort:cpu",), out), Stages(Console(quiet=True)))
        return out

    def measured(
        self, name: str, bundle: Path, methods: Sequence[str], tasks: Mapping[str, Sequence[Sample]],
        known: Results | None = None, precision: str = "fp32", lam: float | None = None,
    ) -> Results:  # fmt: skip
        """Results of some methods, evaluated if their file is missing."""
        file = self.folder / f"{name}.npz"
        if not file.exists():
            console = Console(stderr=True)
            save_results(file, evaluate(bundle, precision, methods, tasks, jobs=self.jobs, lam=lam, known=known, console=console))
        return load_results(file)


def mean(domains: Mapping[str, Any]) -> float:
    """Accuracy, averaged over domains."""
    return float(sum(outcomes.accuracy for outcomes in domains.values()) / len(domains))


def main(
    work: Annotated[Path, typer.Option(help="Folder of checkpoints, bundles and results.")],
    family: Annotated[str, typer.Option(help="gemma2 or llama3.")] = "gemma2",
    width: Annotated[int, typer.Option(help="Hidden size of every model.")] = WIDTH,
    prompts: Annotated[int, typer.Option(help="Test prompts per domain.")] = TEST,
    steps_scale: Annotated[float, typer.Option(help="Multiplies all training steps, for a quick try.")] = 1.0,
    jobs: Annotated[int, typer.Option(help="Processes that answer prompts.")] = 2,
    report: Annotated[bool, typer.Option("--report", help="Only write docs/results.md.")] = False,
) -> None:
    """Run the comparison for one family, or write its report."""
    if report:
        write_results(work, Path(__file__).parents[2] / "docs")
    else:
        comparison = Comparison(family, work, width, prompts, steps_scale, jobs)
        if width == WIDTH:
            comparison.run()
        else:
            comparison.core(("token", "sequence-routed"))


if __name__ == "__main__":
    typer.run(main)
