"""log π_i(y_t) of frozen models on a data set, computed once and cached on disk.

The name of a cache file is a hash of everything that its content depends on.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.training.batches import Samples, by_length
from fusionroute.fr_export.training.data import Row
from fusionroute.fr_export.training.losses import label_log_probs
from fusionroute.fr_export.training.router import DTYPES, final_hidden, lm_logits, load_lm
from fusionroute.runtime.digests import digest_of
from fusionroute.runtime.files import replacing

_FORMAT = "fusionroute scores 1"
# limits of a batch: padded tokens, and logits (the tighter one for large vocabularies)
_TOKENS, _LOGITS = 4096, 1 << 28


@dataclass(frozen=True)
class Scores:
    """One model's predictions at the T learnt tokens of a data set, row by row."""

    log_probs: npt.NDArray[np.float32]  # log π(y_t) [T]
    argmaxes: npt.NDArray[np.int32]  # its most probable token there [T]


def score(
    logits_of: Callable[[Tensor, Tensor], Tensor], rows: Sequence[Row], vocab: int, device: torch.device, advance: Callable[[float], None]
) -> Scores:
    """Score all rows, batched by length. `logits_of(ids [B, S], positions [T])` gives the model's logits [T, vocab].

    `advance` is called with the number of rows of every finished batch.
    """
    samples = Samples(rows, preferred=False)
    log_probs = np.zeros(samples.starts[-1], np.float32)
    argmaxes = np.zeros(samples.starts[-1], np.int32)
    order = sorted(range(len(rows)), key=lambda n: samples.costs[n])
    for numbers in by_length(order, samples.costs, len(rows), min(_TOKENS, _LOGITS // vocab)):
        batch = {name: tensor.to(device) for name, tensor in samples.collate(numbers).items()}
        with torch.inference_mode():
            logits = logits_of(batch["ids"], batch["positions"])
            label_values, best = label_log_probs(logits, batch["labels"]).cpu().numpy(), logits.argmax(-1).cpu().numpy()
        tokens = np.concatenate([np.arange(samples.starts[n], samples.starts[n + 1]) for n in numbers])
        log_probs[tokens], argmaxes[tokens] = label_values, best
        advance(len(numbers))
    return Scores(log_probs, argmaxes)


def expert_scores(
    expert: Checkpoint, rows: Sequence[Row], vocab: int, precision: str, device: torch.device, file: Path, advance: Callable[[float], None]
) -> Scores:
    """An expert's scores over the first `vocab` tokens: read from `file`, or computed and written there."""
    if (cached := read_scores(file)) is not None:
        advance(len(rows))
        return cached
    lm = load_lm(expert, DTYPES["bfloat16" if precision == "bf16" else "float32"]).to(device).eval()
    scores = score(lambda ids, positions: lm_logits(lm, final_hidden(lm, ids, positions), vocab), rows, vocab, device, advance)
    write_scores(file, scores)
    return scores


def informative(experts: Sequence[Scores]) -> npt.NDArray[np.bool_]:
    """bool [T]: whether at least two experts disagree on the most probable token."""
    argmaxes = np.stack([scores.argmaxes for scores in experts])
    return np.asarray((argmaxes != argmaxes[:1]).any(axis=0))


def data_digest(rows: Sequence[Row]) -> str:
    """SHA-256 of rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.ids).to_bytes(8, "little") + row.ids.tobytes() + row.learnt.tobytes())
    return digest.hexdigest()


def model_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint's weights and configs, those of an adapter's base too."""
    digests = [_file_digest(file, (about := file.stat()).st_size, about.st_mtime_ns) for file in sorted(checkpoint.files)]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


@cache
def _file_digest(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file of this size and time of change. The base of several adapters is hashed once."""
    return digest_of(file, ["sha256"]).hexdigests["sha256"]


def cache_key(model: str, data: str, vocab: int, precision: str) -> str:
    """The name of the file with a model's scores of a data set; scores depend on nothing but these arguments."""
    return hashlib.sha256(" ".join((_FORMAT, model, data, str(vocab), precision)).encode()).hexdigest()


def read_scores(file: Path) -> Scores | None:
    """Scores from a file; None where it is missing or incomplete."""
    try:
        return Scores(**load_file(file))
    except (FileNotFoundError, SafetensorError, TypeError):
        return None


def write_scores(file: Path, scores: Scores) -> None:
    """Write scores in one step: other runs see the whole file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        save_file({"log_probs": scores.log_probs, "argmaxes": scores.argmaxes}, partial)
