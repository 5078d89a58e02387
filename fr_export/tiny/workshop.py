"""Train a family's small system from nothing: one base, three experts, and a router per seed.

Experts and routers are whole models, or LoRA adapters of the base.

Everything is trained by the tool itself (`fr_export.training.train`), from files that seeded generators write.
`benchmarks/comparison.py` trains the baselines of docs/results.md from the same parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.tasks.domains import COMPOSITE, DOMAINS, PAIRED
from fusionroute.fr_export.tiny.architectures import WIDTH, Architecture, new_model
from fusionroute.fr_export.tiny.corpus import write_preferences, write_sft
from fusionroute.fr_export.tiny.tokenizer import build_tokenizer
from fusionroute.fr_export.training.recipe import Recipe, Stage
from fusionroute.fr_export.training.request import TrainingRequest
from fusionroute.fr_export.training.train import train

TOKENS = 1024  # per batch
ROWS = 24  # of training data per step, about two thirds of what a batch takes
BASE_LR, EXPERT_LR = 4e-3, 2e-3
ADAPTER_RANK = 16  # of systems whose models are adapters
# The head learns slowly: at 1e-2 its softmax saturates on one expert before it can tell the domains apart, and stays
# there.
SFT_LR, MIXED_LR, HEAD_LR = 2e-3, 5e-4, 1e-3

EVEN_MIX = {**dict.fromkeys(DOMAINS, 1.0), COMPOSITE: 1.0, PAIRED: 0.5}
BASE_MIX = {"math": 1.5, "code": 0.75, "instruction": 0.75, COMPOSITE: 0.75, PAIRED: 0.5}  # sums take longest to learn
# Without any composites an expert forgets that a prompt may ask for two things, and cannot go on in the middle of such
# an answer.
EXPERT_COMPOSITES = 0.15


@dataclass(frozen=True)
class Budget:
    """Optimizer steps of each run.

    The base learns a little of everything; experts still err in their own domain, as real ones do.
    """

    base: int = 3000
    experts: Mapping[str, int] = field(default_factory=lambda: {"math": 600, "code": 300, "instruction": 300})
    sft: int = 1200
    mixed: int = 300

    def scaled(self, factor: float) -> "Budget":
        """All numbers of steps times `factor`, for quick tries."""

        def of(steps: int) -> int:
            return max(1, round(steps * factor))

        return Budget(of(self.base), {name: of(steps) for name, steps in self.experts.items()}, of(self.sft), of(self.mixed))


BUDGETS = {
    "gemma2": Budget(base=1500),  # Gemma 2 learns twice as fast here: after 3,000 steps its experts had nothing to add
    "llama3": Budget(),
}


@dataclass(frozen=True)
class Workshop:
    """The folder in which a family's models are trained. A model that is complete there is not trained again.

    `lora_rank`: of experts and routers, which are then adapters of the base; 0: they are whole models.
    """

    architecture: Architecture
    folder: Path
    width: int = WIDTH
    budget: Budget = Budget()
    lora_rank: int = 0

    @property
    def expert_folders(self) -> dict[str, str]:
        """Expert name → folder, in the order of the routing head's rows."""
        return {name: str(self.folder / "experts" / name) for name in DOMAINS}

    def base(self) -> Path:
        """The common ancestor, trained on all domains, too briefly to master any."""
        start = self.folder / "untrained"
        if not start.exists():
            torch.manual_seed(0)
            tokenizer = build_tokenizer(self.architecture)
            model = new_model(self.architecture, self.width)
            model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([self.architecture.end_of_turn, self.architecture.eos])
            model.save_pretrained(start)
            tokenizer.save_pretrained(start)
        # whole experts go on from what was trained; adapters belong to what is stored
        return self._direct("base", start, BASE_MIX, self.budget.base, BASE_LR, 1, "bfloat16" if self.lora_rank else "float32")

    def expert(self, domain: str) -> Path:
        """The base fine-tuned on the answers of one domain, or an adapter of it; in bfloat16 as published experts are."""
        seed = 2 + DOMAINS.index(domain)
        return self._direct(
            f"experts/{domain}",
            self.base(),
            {domain: 1.0, COMPOSITE: EXPERT_COMPOSITES},
            self.budget.experts[domain],
            EXPERT_LR,
            seed,
            "bfloat16",
            self.lora_rank,
        )

    def router(self, seed: int) -> Path:
        """The router, trained from the instruction expert: SFT, then the mixed run of Algorithm 1.

        Its `stages/sft` is the router after SFT.
        """
        return self._post_train(f"routers/{seed}", self.expert_folders, seed)

    def direct(self, seed: int) -> Path:
        """The paper's baseline "direct fine-tuning": SFT, then SFT mixed with DPO.

        Start, data and steps are those of `router`; there is no routing.
        """
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
            sft=self._sft("router", EVEN_MIX, steps, seed=10),
            preferences=self._preferences(self.budget.mixed, seed=11),
            keep_stages=True,
            dtype="bfloat16",
            lora_rank=self.lora_rank,
        )

    def _direct(
        self, name: str, start: Path, mix: Mapping[str, float], steps: int, lr: float, seed: int, dtype: str, lora_rank: int = 0
    ) -> Path:
        stage, sft = Stage("sft", lr, max_steps=steps), self._sft(name.replace("/", "-"), mix, steps, seed)
        return self._train(name, start, (stage,), {}, seed, lora_rank, sft=sft, dtype=dtype)

    def _train(
        self, name: str, start: Path, stages: tuple[Stage, ...], experts: dict[str, str], seed: int, lora_rank: int, **settings: object
    ) -> Path:
        out = self.folder / name
        if not out.exists():
            recipe = Recipe(stages, batch_tokens=TOKENS, optimizer="muon", seed=seed, lora_rank=lora_rank)
            family = FAMILIES[self.architecture.name]
            train(TrainingRequest(family, str(start), out, recipe, experts, cache=self.folder / "cache", **settings))  # type: ignore[arg-type]
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
            write_preferences(file, EVEN_MIX, steps * ROWS // 2, seed)
        return file
