"""How a router is trained: the stages, their numbers, and the two presets.

Light to import: the command line takes its defaults from here.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fusionroute.runtime.errors import InputError

StageName = Literal["sft", "cdpo", "mixed"]
"""Supervised samples; preferences; both, shuffled together."""
Optimizer = Literal["adamw", "muon"]
ComputePrecision = Literal["fp32", "bf16"]
Dtype = Literal["float32", "float16", "bfloat16"]
"""Of the written weights."""
RANK = 16  # of LoRA adapters, where nobody names another


@dataclass(frozen=True)
class Stage:
    """One pass of the optimizer from warm-up to zero. `max_steps` counts optimizer steps and replaces `epochs`.

    Raises InputError for an unknown name and for a learning rate that is not finite.
    """

    name: str  # a StageName
    learning_rate: float = 1e-5
    head_learning_rate: float | None = None  # None: the same
    epochs: int = 1
    max_steps: int | None = None

    def __post_init__(self) -> None:
        _check_choice("training stage", self.name, get_args(StageName))
        rates = (self.learning_rate, *([] if self.head_learning_rate is None else [self.head_learning_rate]))
        _check_finite(f"learning rate of stage {self.name}", *rates)

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
    """How to train.

    A batch is `batch_size` rows (or pairs), or, where `batch_tokens` is set, as many as fit that many padded tokens.
    Raises InputError for a name that is unknown, a stage that is named twice or missing, and a number that is not
    finite.
    """

    stages: tuple[Stage, ...]
    batch_size: int = 8  # per device
    batch_tokens: int | None = None  # per device
    accumulation: int = 1  # batches per optimizer step and device
    optimizer: Optimizer = "adamw"
    warmup: float = 0.05  # share of the steps
    clip: float = 1.0  # norm of the gradient
    beta: float = 0.1  # β of CDPO
    routing_weight: float = 1 / 3  # λ of the SFT loss
    lora_rank: int | None = 0  # of the adapters; 0: all weights are trained; None: as the model's size suggests
    max_length: int = 2048  # tokens; longer rows are skipped
    precision: ComputePrecision = "fp32"  # of the computation; weights and optimizer are always fp32
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError(f"The recipe has no stage; expected at least one of {', '.join(get_args(StageName))}.")
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise InputError("The recipe names a stage twice; expected each once.")
        _check_choice("optimizer", self.optimizer, get_args(Optimizer))
        _check_choice("precision", self.precision, get_args(ComputePrecision))
        for name in ("warmup", "clip", "beta", "routing_weight"):
            _check_finite(name.replace("_", " "), getattr(self, name))


@dataclass(frozen=True)
class Preset:
    """Numbers of a published run."""

    learning_rate: float
    epochs: int
    batch_size: int


PresetName = Literal["paper", "seed"]
# The paper's (its batch size is not stated), and those of the review that the project began with.
PRESETS: dict[PresetName, Preset] = {"paper": Preset(1e-5, 1, 8), "seed": Preset(1e-3, 10, 32)}


def _check_choice(what: str, name: str, choices: tuple[str, ...]) -> None:
    if name not in choices:
        raise InputError(f"Unknown {what} '{name}'; expected {', '.join(choices[:-1])} or {choices[-1]}.")


def _check_finite(what: str, *values: float) -> None:
    for value in values:
        if not math.isfinite(value):
            raise InputError(f"The {what} is {value}; expected a finite number.")
