"""The recipe of the small trained systems that the repository ships: one base, three experts, one router per family.

python -m fr_export.training.tiny --family gemma2 [--work DIR] [--out DIR]

Everything is trained with the tool (`fr_export.training.train`) from files that seeded generators write; λ is tuned on the validation split
through the exported bundle. `benchmarks/comparison.py` trains the baselines of docs/results.md from the same parts.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from fusionroute.fr_export import families
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.evaluation import lambdas
from fusionroute.fr_export.evaluation.outcomes import Results
from fusionroute.fr_export.evaluation.run import evaluate
from fusionroute.fr_export.export import Request as ExportRequest
from fusionroute.fr_export.export import export
from fusionroute.fr_export.families.family import TINY_SYSTEMS
from fusionroute.fr_export.tasks.domains import COMPOSITE, DOMAINS, PAIRED, Sample, draw_many
from fusionroute.fr_export.training.architectures import FAMILIES, WIDTH, Family, new_model
from fusionroute.fr_export.training.corpus import write_preferences, write_sft
from fusionroute.fr_export.training.folder import TRAINING_FILE, RouterStaging
from fusionroute.fr_export.training.recipe import Recipe, Request, Stage
from fusionroute.fr_export.training.tiny_tokenizer import build_tokenizer
from fusionroute.fr_export.training.train import train

TOKENS = 1024  # per batch
ROWS = 24  # of training data per step, about two thirds of what a batch takes
BASE_LR, EXPERT_LR = 4e-3, 2e-3
# The head learns slowly: at 1e-2 its softmax saturates on one expert before the domains are told apart, and stays.
SFT_LR, MIXED_LR, HEAD_LR = 2e-3, 5e-4, 1e-3

EVEN = {**dict.fromkeys(DOMAINS, 1.0), COMPOSITE: 1.0, PAIRED: 0.5}
BASE_MIX = {"math": 1.5, "code": 0.75, "instruction": 0.75, COMPOSITE: 0.75, PAIRED: 0.5}  # sums are what takes longest to learn
# Without any composites an expert forgets that a prompt may ask for two things, and is of no use in the midst of such an answer.
EXPERT_COMPOSITES = 0.15
SEEDS = (0, 1, 2)  # of the routers, from the same experts and rows; the best on the validation split is shipped
VALIDATION = 500  # prompts per domain, for λ
TUNED_ON = (*DOMAINS, COMPOSITE)  # the unseen composites have no part in any choice


@dataclass(frozen=True)
class Budget:
    """Optimizer steps of each run. The base can do a little of all; experts still err in their own domain, as real ones do."""

    base: int = 3000
    experts: Mapping[str, int] = field(default_factory=lambda: {"math": 600, "code": 300, "instruction": 300})
    sft: int = 1200
    mixed: int = 300

    def scaled(self, factor: float) -> "Budget":
        """The same in proportion, for quick tries."""

        def of(steps: int) -> int:
            return max(1, round(steps * factor))

        return Budget(of(self.base), {name: of(steps) for name, steps in self.experts.items()}, of(self.sft), of(self.mixed))


BUDGETS = {
    "gemma2": Budget(base=1500),
    "llama3": Budget(),
}  # Gemma 2 learns twice as fast here: after 3,000 steps its experts had nothing to add


@dataclass(frozen=True)
class Workshop:
    """The folder in which a family's models come into being; what is complete there is not made again."""

    family: Family
    folder: Path
    width: int = WIDTH
    budget: Budget = Budget()

    @property
    def expert_folders(self) -> dict[str, str]:
        """Name → folder, in the order of the routing head's rows."""
        return {name: str(self.folder / "experts" / name) for name in DOMAINS}

    def base(self) -> Path:
        """The common ancestor: all domains, too short to master any."""
        start = self.folder / "untrained"
        if not start.exists():
            torch.manual_seed(0)
            tokenizer = build_tokenizer(self.family)
            model = new_model(self.family, self.width)
            model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([self.family.end_of_turn, self.family.eos])
            model.save_pretrained(start)
            tokenizer.save_pretrained(start)
        return self._direct("base", start, BASE_MIX, self.budget.base, BASE_LR, seed=1)

    def expert(self, domain: str) -> Path:
        """The base fine-tuned on the answers of one domain, stored in bfloat16 as published experts are."""
        seed = 2 + DOMAINS.index(domain)
        return self._direct(
            f"experts/{domain}",
            self.base(),
            {domain: 1.0, COMPOSITE: EXPERT_COMPOSITES},
            self.budget.experts[domain],
            EXPERT_LR,
            seed,
            "bfloat16",
        )

    def router(self, seed: int) -> Path:
        """SFT, then the mixed run of Algorithm 1, from the instruction expert; `stages/sft` in it is the router after SFT."""
        return self._post_train(f"routers/{seed}", self.expert_folders, seed)

    def direct(self, seed: int) -> Path:
        """The paper's direct fine-tuning: the same start, data and steps without routing, SFT and then SFT mixed with DPO."""
        return self._post_train(f"direct/{seed}", {}, seed)

    def _post_train(self, name: str, experts: dict[str, str], seed: int) -> Path:
        stages = (Stage("sft", SFT_LR, HEAD_LR, max_steps=self.budget.sft), Stage("mixed", MIXED_LR, HEAD_LR, max_steps=self.budget.mixed))
        for domain in DOMAINS:
            self.expert(domain)
        steps = self.budget.sft + self.budget.mixed
        return self._train(
            name,
            self.folder / "experts" / "instruction",
            stages,
            experts,
            seed,
            sft=self._sft("router", EVEN, steps, seed=10),
            preferences=self._preferences(self.budget.mixed, seed=11),
            keep_stages=True,
            dtype="bfloat16",
        )

    def _direct(self, name: str, start: Path, mix: Mapping[str, float], steps: int, lr: float, seed: int, dtype: str = "float32") -> Path:
        stage = Stage("sft", lr, max_steps=steps)
        return self._train(name, start, (stage,), {}, seed, sft=self._sft(name.replace("/", "-"), mix, steps, seed), dtype=dtype)

    def _train(self, name: str, start: Path, stages: tuple[Stage, ...], experts: dict[str, str], seed: int, **request: object) -> Path:
        out = self.folder / name
        if not out.exists():
            recipe = Recipe(stages, batch_tokens=TOKENS, optimizer="muon", seed=seed)
            family = families.FAMILIES[self.family.name]
            train(Request(family, str(start), out, recipe, experts, cache=self.folder / "cache", **request))  # type: ignore[arg-type]
        return out

    def _sft(self, name: str, mix: Mapping[str, float], steps: int, seed: int) -> Path:
        file = self.folder / "data" / f"{name}.jsonl"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_sft(file, mix, steps * ROWS, seed)
        return file

    def _preferences(self, steps: int, seed: int) -> Path:
        file = self.folder / "data" / "preferences.jsonl"
        if not file.exists():
            write_preferences(file, EVEN, steps * ROWS // 2, seed)
        return file


def validation() -> dict[str, list[Sample]]:
    """The prompts that λ, and the baselines' own constants, are chosen on."""
    return {domain: draw_many(domain, "validation", VALIDATION, seed=0) for domain in TUNED_ON}


def tuned(results: Results) -> FusionSettings:
    """The best λ of a sweep, with the curve."""
    points = lambdas.curve(results)
    return FusionSettings(lam=lambdas.best(points), lam_curve=points)


def chosen(settings: Mapping[int, FusionSettings]) -> int:
    """The seed whose router is the best on the validation split, each at its own λ; the first among equals."""
    return max(settings, key=lambda seed: max(accuracy for _, accuracy in settings[seed].lam_curve or []))


class _SystemStaging(RouterStaging):
    """The folder of a whole system; a router trained here lies in it."""

    mark = f"router/{TRAINING_FILE}"


def ship(workshop: Workshop, out: Path, jobs: int, console: Console) -> FusionSettings:
    """Train the family's systems, tune λ on their exported bundles, and put the best into `out`, whose older content goes when all is done."""
    settings = {}
    for seed in SEEDS:
        bundle, router = workshop.folder / "bundle", workshop.router(seed)
        request = ExportRequest(
            families.FAMILIES[workshop.family.name], str(router), workshop.expert_folders, ("fp32",), ("ort:cpu",), bundle, force=True
        )
        export(request, Stages(Console(quiet=True)))
        settings[seed] = tuned(evaluate(bundle, "fp32", lambdas.methods(), validation(), jobs=jobs, console=console))
    best = chosen(settings)
    with _SystemStaging(out, force=True) as staging:
        shutil.copytree(workshop.router(best), staging.folder / "router", ignore=shutil.ignore_patterns("stages", "losses.json"))
        settings[best].write(staging.folder / "router")
        for name, folder in workshop.expert_folders.items():
            shutil.copytree(folder, staging.folder / "experts" / name, ignore=shutil.ignore_patterns("losses.json", "loss.png"))
    return settings[best]


def main(
    family: Annotated[str, typer.Option(help="gemma2 or llama3.")],
    work: Annotated[Path, typer.Option(help="Folder for everything on the way; what is complete there is not made again.")] = Path(
        "dist/tiny"
    ),
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: the one that the package ships.")] = None,
    steps_scale: Annotated[float, typer.Option(help="Multiplies all numbers of training steps, for a quick try.")] = 1.0,
    jobs: Annotated[int, typer.Option(help="Processes that tune λ.")] = 2,
) -> None:
    """Train a family's small system from nothing and write it."""
    if family not in FAMILIES:
        raise typer.BadParameter(f"unknown family '{family}'; expected {' or '.join(FAMILIES)}", param_hint="--family")
    console = Console(stderr=True)
    workshop = Workshop(FAMILIES[family], work / f"{family}-{WIDTH}", budget=BUDGETS[family].scaled(steps_scale))
    settings = ship(workshop, out or TINY_SYSTEMS / family, jobs, console)
    console.print(f"λ = {settings.lam}, mean accuracy on the validation split {max(value for _, value in settings.lam_curve or []):.1%}")


if __name__ == "__main__":
    typer.run(main)
