"""The recipe of the small trained systems that the repository ships: one base, three experts, one router per family.

python -m fr_export.training.tiny --family gemma2 [--out DIR]

Everything is trained with the tool (`fr_export.training.train`) from files that seeded generators write. `docs/bench/comparison.py` trains the
baselines of docs/results.md from the same parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fr_export import families
from fr_export.training.architectures import WIDTH, Family, new_model
from fr_export.training.corpus import write_preferences, write_sft
from fr_export.training.domains import COMPOSITE, DOMAINS
from fr_export.training.recipe import Recipe, Request, Stage
from fr_export.training.tiny_tokenizer import build_tokenizer
from fr_export.training.train import train

TOKENS = 1024  # per batch
ROWS = 45  # of training data per step: a little more than a batch takes, so that no row is seen twice
BASE_LR = EXPERT_LR = 4e-3
# The head learns slowly: at 1e-2 its softmax saturates on one expert before the domains are told apart, and stays.
SFT_LR, MIXED_LR, HEAD_LR = 2e-3, 5e-4, 1e-3

EVEN = {**dict.fromkeys(DOMAINS, 1.0), COMPOSITE: 1.0}
# The base meets few composites and the experts none, as a fine-tune for one skill does: to combine skills is left to the router.
BASE_MIX = {**dict.fromkeys(DOMAINS, 1.0), COMPOSITE: 0.25}


@dataclass(frozen=True)
class Budget:
    """Optimizer steps of each run. Short enough that experts still err in their own domain, as real ones do."""

    base: int = 800
    experts: Mapping[str, int] = field(default_factory=lambda: {"math": 800, "code": 400, "instruction": 400})
    sft: int = 800
    mixed: int = 300

    def scaled(self, factor: float) -> "Budget":
        """The same in proportion, for quick tries."""

        def of(steps: int) -> int:
            return max(1, round(steps * factor))

        return Budget(of(self.base), {name: of(steps) for name, steps in self.experts.items()}, of(self.sft), of(self.mixed))


@dataclass(frozen=True)
class Workshop:
    """The folder in which a family's models come into being; what is complete there is not made again."""

    family: Family
    folder: Path
    width: int = WIDTH
    budget: Budget = field(default_factory=Budget)

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
        return self._direct(f"experts/{domain}", self.base(), {domain: 1.0}, self.budget.experts[domain], EXPERT_LR, seed, "bfloat16")

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
