"""What a training run is asked to do: its stages, their numbers, and the two presets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusionroute.fr_export.families import Family
from fusionroute.fr_export.training.data import Pair, Row
from fusionroute.runtime.errors import InputError

STAGES = {"sft": "supervised samples", "cdpo": "preferences", "mixed": "supervised samples and preferences, shuffled together"}
OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Stage:
    """One pass of the optimizer from warm-up to zero. `max_steps` counts optimizer steps and replaces `epochs`."""

    name: str  # of STAGES
    learning_rate: float = 1e-5
    head_learning_rate: float | None = None  # None: the same
    epochs: int = 1
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.name not in STAGES:
            raise InputError(f"Unknown training stage '{self.name}'; expected {', '.join(STAGES)}.")
        rates = (self.learning_rate, *([] if self.head_learning_rate is None else [self.head_learning_rate]))
        check_finite(f"learning rate of stage {self.name}", *rates)

    @property
    def supervised(self) -> bool:
        """Whether it learns from SFT samples."""
        return self.name != "cdpo"

    @property
    def preferred(self) -> bool:
        """Whether it learns from preferences."""
        return self.name != "sft"


@dataclass(frozen=True)
class Recipe:
    """How to train. A batch is `batch_size` rows (or pairs), or, where `batch_tokens` is set, as many as fit that many padded tokens."""

    stages: tuple[Stage, ...]
    batch_size: int = 8  # per device
    batch_tokens: int | None = None  # per device
    accumulation: int = 1  # batches per optimizer step and device
    optimizer: str = "adamw"
    warmup: float = 0.05  # share of the steps
    clip: float = 1.0  # norm of the gradient
    beta: float = 0.1  # β of CDPO
    routing_weight: float = 1 / 3  # λ of the SFT loss
    lora_rank: int = 0  # 0: all weights are trained
    max_length: int = 2048  # tokens; longer rows are skipped
    precision: str = "fp32"  # of the computation; weights and optimizer are fp32 always
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError(f"The recipe has no stage; expected at least one of {', '.join(STAGES)}.")
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise InputError("The recipe names a stage twice; expected each once.")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"Unknown optimizer '{self.optimizer}'; expected {' or '.join(OPTIMIZERS)}.")
        if self.precision not in PRECISIONS:
            raise InputError(f"Unknown precision '{self.precision}'; expected {' or '.join(PRECISIONS)}.")
        for name in ("warmup", "clip", "beta", "routing_weight"):
            check_finite(name.replace("_", " "), getattr(self, name))


def check_finite(what: str, *values: float) -> None:
    """Raises InputError for infinity and for what is no number."""
    for value in values:
        if not math.isfinite(value):
            raise InputError(f"The {what} is {value}; expected a finite number.")


@dataclass(frozen=True)
class Preset:
    """Published numbers."""

    learning_rate: float
    epochs: int
    batch_size: int


# The paper's (its batch size is not stated), and those of the review that the project began with.
PRESETS = {"paper": Preset(1e-5, 1, 8), "seed": Preset(1e-3, 10, 32)}


@dataclass(frozen=True)
class Request:
    """One run. Without experts it is direct fine-tuning: plain SFT and plain DPO, no routing head.

    `sft` and `preferences` are JSONL files, or rows that the caller has made. `cache` is where the experts' log-probabilities
    are kept for other runs (None: they are computed and forgotten). `dtype` is that of the written weights (None: the source's).
    """

    family: Family
    router: str
    out: Path
    recipe: Recipe
    experts: dict[str, str]
    sft: Path | Sequence[Row] | None = None
    preferences: Path | Sequence[Pair] | None = None
    cache: Path | None = None
    dtype: str | None = None
    keep_stages: bool = False
    checkpoint_every: int | None = None
    resume: bool = False
    force: bool = False
