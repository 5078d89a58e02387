"""What one training run is asked to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusionroute.fr_export.families import Family
from fusionroute.fr_export.training.data import Pair, Row
from fusionroute.fr_export.training.recipe import Dtype, Recipe


@dataclass(frozen=True)
class TrainingRequest:
    """One run. Without experts it is direct fine-tuning: plain SFT and plain DPO, no routing head.

    `family` is the router's; None takes the one that its config names. `router` and the values of `experts` are folders
    or hub ids of models or LoRA adapters, `base` is the model under all adapters (None: the one that each names); the
    order of the experts is that of the routing head's rows. `sft` and `preferences` are JSONL files, or rows that are
    tokenised already. `cache` is the folder that keeps the experts' log-probabilities for other runs (None: nothing is
    kept). `dtype` is that of the written weights (None: the source's, and float32 of adapters). `merge` writes a whole
    model where adapters are trained.
    """

    family: Family | None
    router: str
    out: Path
    recipe: Recipe
    experts: dict[str, str]
    sft: Path | Sequence[Row] | None = None
    preferences: Path | Sequence[Pair] | None = None
    cache: Path | None = None
    base: str | None = None
    dtype: Dtype | None = None
    merge: bool = False
    keep_stages: bool = False
    checkpoint_every: int | None = None  # optimizer steps
    resume: bool = False
    force: bool = False
