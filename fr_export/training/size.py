"""Whether a model is trained in full or through LoRA adapters, where nobody says."""

import math

import psutil
import torch

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.training.recipe import RANK
from fusionroute.runtime.adapters.lora_config import LoraConfig

LARGE = 1_000_000_000  # parameters
_BYTES = 16  # per parameter of full training: weight, gradient and AdamW's two moments, all fp32
_SHARE = 0.7  # of the memory; activations and everything else need the rest


def parameters(checkpoint: Checkpoint) -> int:
    """How many values the checkpoint's weights hold."""
    return sum(math.prod(entry.shape) for entry in checkpoint.weights.entries.values())


def lora_rank(checkpoint: Checkpoint, rank: int | None) -> tuple[int, str | None]:
    """The rank to train with, 0 for full training, and a sentence about it where `rank` did not say it.

    A checkpoint that is an adapter is trained further as it is, unless `rank` is 0. `rank` None lets the size decide.
    """
    if rank != 0 and checkpoint.source.kind == "adapter":
        own = LoraConfig.read(checkpoint.folder, checkpoint.where).r
        return own, f"Training the adapter further that the router starts from; its rank {own} stays."
    return (rank, None) if rank is not None else default_rank(checkpoint)


def default_rank(checkpoint: Checkpoint) -> tuple[int, str]:
    """The LoRA rank to train with, 0 for full training, and a sentence that says why."""
    count, memory = parameters(checkpoint), _memory()
    size = f"{count / 1e9:.1f} billion parameters" if count >= 1e9 else f"{count / 1e6:.1f} million parameters"
    if count > LARGE:
        return RANK, f"Training LoRA adapters of rank {RANK}: the model has {size} (--full trains them all)."
    if count * _BYTES > _SHARE * memory:
        needs = f"{size} need {count * _BYTES / 2**30:.1f} GiB in full training, and there are {memory / 2**30:.1f} GiB"
        return RANK, f"Training LoRA adapters of rank {RANK}: {needs} (--full trains them all)."
    return 0, f"Training all {size} (--lora trains adapters alone)."


def _memory() -> int:
    """Bytes of the device that trains. All of them, used or not: a resumed run must choose the same."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(psutil.virtual_memory().total)
