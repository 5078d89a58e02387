"""A router that nobody has trained: a checkpoint with a routing head drawn at random, to try a system before training.

The scores of a head drawn at random are dominated by what all hidden states have in common, so that one expert would
win every token. The head is therefore centred on the hidden states of some texts: every expert's score has mean 0 and
standard deviation 1 there, and the choice changes from token to token. What it chooses means nothing.
"""

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusionroute.calibration.prompts import HELD_OUT
from fusionroute.fr_export.checkpoints.checkpoint import HEAD_FILE, Checkpoint
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.training.folder import TRAINING_FILE, RouterStaging
from fusionroute.fr_export.training.router import DTYPES, HEAD_KEY, final_hidden, has_head, load_lm, stored_dtype
from fusionroute.runtime.errors import InputError

_TOKENS = 512  # of each text that the head is centred on, at most
_TEXTS = 8


@dataclass(frozen=True)
class NewRouter:
    """What was made. `shares` is how often each expert is chosen on the texts; empty for a head of zeros."""

    out: str
    hidden: int
    experts: int
    linked: int  # weight files that are links to those of the base
    shares: list[float]


def init_router(
    source: str, experts: int, out: Path, *, seed: int | None = 0, base: str | None = None, copy: bool = False, force: bool = False
) -> NewRouter:
    """Write a router of `source`, a model or LoRA adapter, with an untrained head for a number of experts.

    `seed` draws the head; None makes it zeros, without running the model, and then the first expert is always chosen.
    Weights of a whole model are hard links, symbolic ones on another disk, unless `copy`. An adapter is copied; `base` is
    the model under it. Raises InputError where the source cannot be read or has a head inside its weights, or `out`
    exists and must not be replaced.
    """
    if experts < 1:
        raise InputError(f"{experts} experts: expected at least one.")
    staging = RouterStaging(out, force)
    staging.prepare()  # now, not after the model has run
    checkpoint = Checkpoint.open("router", source, None, HEAD_KEY, base)
    if has_head(checkpoint) and checkpoint.weights.entries[f"{HEAD_KEY}.weight"].files[0].name != HEAD_FILE:
        raise InputError(f"{checkpoint.where} holds a routing head among its weights, so it is a router already: export it as it is.")
    hidden = checkpoint.config.hidden_size
    head, shares = torch.zeros(experts, hidden), []
    if seed is not None:
        states = _states(checkpoint)
        head = centred_head(states, experts, seed)
        shares = torch.bincount((states @ head.T).argmax(-1), minlength=experts).div(len(states)).tolist()
    with staging:
        linked = _place(checkpoint, staging.folder, copy)
        save_file({f"{HEAD_KEY}.weight": head}, staging.folder / HEAD_FILE)
        (staging.folder / HEAD_FILE).chmod(0o644)  # safetensors writes for the owner only
        FusionSettings().write(staging.folder)
        described = {"untrained": True, "experts": experts, "seed": seed}
        (staging.folder / TRAINING_FILE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return NewRouter(str(out), hidden, experts, linked, shares)


def centred_head(states: Tensor, experts: int, seed: int) -> Tensor:
    """A head float32 [experts, hidden] whose scores on `states` [T, hidden] have mean 0 and standard deviation 1.

    Every row is orthogonal to the mean state, so no bias is needed. Raises InputError for fewer than two states.
    """
    if len(states) < 2:
        raise InputError("A head can only be centred on two or more hidden states.")
    rows = torch.randn(experts, states.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    states = states.double()
    mean = states.mean(0)
    rows -= (rows @ mean)[:, None] * mean / mean.square().sum()
    return (rows / (states @ rows.T).std(0)[:, None]).float()


def _states(checkpoint: Checkpoint) -> Tensor:
    """Final hidden states float32 [T, hidden] of the built-in texts, or of random tokens where there is no tokenizer."""
    if checkpoint.tokenizer is None:
        texts = [torch.randint(checkpoint.config.vocab_size, (_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()]
    else:
        texts = [checkpoint.tokenizer.encode(text).ids[:_TOKENS] for text in HELD_OUT[:_TEXTS]]
    lm = load_lm(checkpoint, DTYPES[stored_dtype(checkpoint)])
    with torch.inference_mode():
        return torch.cat([final_hidden(lm, torch.tensor([ids]), torch.arange(len(ids))).float() for ids in texts])


def _place(checkpoint: Checkpoint, folder: Path, copy: bool) -> int:
    """Put the checkpoint's own files into `folder`; how many of them are links."""
    own = checkpoint.folder
    weights = sorted(file for file in checkpoint.weights.files if file.parent == own and file.name != HEAD_FILE)
    adapter = checkpoint.source.kind == "adapter"
    for file in weights:
        if copy or adapter:
            shutil.copyfile(file, folder / file.name)
        else:
            _link(file.resolve(), folder / file.name)  # hub caches hold links
    for file in checkpoint.texts.values():
        # what a GGUF file's texts were made into lies elsewhere, and is made again
        if file.parent == own and file.name not in (TRAINING_FILE, "losses.json"):
            shutil.copyfile(file, folder / file.name)
    return 0 if copy or adapter else len(weights)


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP):
            raise
        place.symlink_to(file)
