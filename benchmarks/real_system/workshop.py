"""Trains the experts, the router and the baseline, each once. An interrupted run goes on from its last checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from benchmarks.real_system.corpus import EXPERT_MIX, EXPERTS, ROUTER_MIX, write_preferences, write_sft
from fusionroute.fr_export.checkpoints.hub import locate
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.training.recipe import RANK, Recipe, Stage
from fusionroute.fr_export.training.request import TrainingRequest
from fusionroute.fr_export.training.train import train

TOKENS = 1024  # per batch
ROWS = 14  # of training data per step, about what fills a batch
SAVE_EVERY = 25  # optimizer steps
EXPERT_LR, SFT_LR, MIXED_LR, HEAD_LR = 5e-4, 3e-4, 1e-4, 1e-3


@dataclass(frozen=True)
class Budget:
    """Optimizer steps of each run."""

    experts: Mapping[str, int] = field(default_factory=lambda: {"math": 240, "code": 120, "instruction": 120})
    sft: int = 120
    mixed: int = 40

    def scaled(self, factor: float) -> "Budget":
        """All numbers of steps times `factor`, for a quick try."""

        def of(steps: int) -> int:
            return max(1, round(steps * factor))

        return Budget({name: of(steps) for name, steps in self.experts.items()}, of(self.sft), of(self.mixed))


@dataclass(frozen=True)
class Workshop:
    """The folder of everything. `base` is a folder or hub id."""

    base: str
    folder: Path
    budget: Budget = Budget()

    @property
    def experts(self) -> dict[str, str]:
        """Expert name → adapter folder, in the order of the routing head's rows."""
        return {name: str(self.folder / "experts" / name) for name in EXPERTS}

    @property
    def router(self) -> Path:
        """The router; `stages/sft` below it is the one before CDPO."""
        return self.folder / "router"

    @property
    def direct(self) -> Path:
        """The paper's baseline: the router's start, data and steps, without experts and with plain DPO."""
        return self.folder / "direct"

    def write_data(self) -> None:
        """All training files that are missing."""
        for number, name in enumerate(EXPERTS):
            if not (file := self._data(name)).exists():
                write_sft(file, EXPERT_MIX[name], self.budget.experts[name] * ROWS, seed=number)
        if not (file := self._data("router")).exists():
            write_sft(file, ROUTER_MIX, (self.budget.sft + self.budget.mixed) * ROWS, seed=10)
        if not (file := self._data("preferences")).exists():
            write_preferences(file, self.budget.mixed * ROWS // 2, seed=11)

    def train_expert(self, name: str) -> None:
        """A LoRA expert of one domain. Raises KeyError for another name."""
        stage = Stage("sft", EXPERT_LR, max_steps=self.budget.experts[name])
        self._train(self.folder / "experts" / name, self.base, (stage,), {}, self._data(name), None)

    def train_router(self) -> None:
        """SFT, then the mixed run of Algorithm 1, from the instruction expert. All experts must be there."""
        self._post_train(self.router, self.experts)

    def train_direct(self) -> None:
        """The same without experts. The instruction expert must be there."""
        self._post_train(self.direct, {})

    def _post_train(self, out: Path, experts: dict[str, str]) -> None:
        stages = (Stage("sft", SFT_LR, HEAD_LR, max_steps=self.budget.sft), Stage("mixed", MIXED_LR, HEAD_LR, max_steps=self.budget.mixed))
        self._train(out, self.experts["instruction"], stages, experts, self._data("router"), self._data("preferences"))

    def _train(
        self, out: Path, start: str, stages: tuple[Stage, ...], experts: dict[str, str], sft: Path, preferences: Path | None
    ) -> None:
        if out.exists():
            return
        console = Console(stderr=True)
        console.print(f"training {out}")
        display = Stages(console)
        base = locate(self.base)
        request = TrainingRequest(
            family=None,
            router=str(base) if start == self.base else start,
            base=None if start == self.base else str(base),
            out=out,
            recipe=Recipe(stages, batch_tokens=TOKENS, lora_rank=RANK, precision="bf16"),
            experts=experts,
            sft=sft,
            preferences=preferences,
            cache=self.folder / "cache",
            keep_stages=True,
            checkpoint_every=SAVE_EVERY,
            resume=(out.parent / f"{out.name}.unfinished" / "run.json").is_file(),
        )
        with display.progress:
            train(request, display)

    def _data(self, name: str) -> Path:
        return self.folder / "data" / f"{name}.jsonl"
