"""Right answers, read by every model: what each method would have given to each token of them.

One pass per model and answer says what all methods, all λ and all ways of routing would do, where generating would take
a run for each. No method sees its own mistakes here, which `measure` is for.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from benchmarks.real_system.tasks import Task
from fusionroute.fr_export.evaluation.lambdas import GRID
from fusionroute.runtime import FusionRuntime

Floats = npt.NDArray[np.float32]
BLOCK = 64  # positions whose logits are fused at a time


@dataclass(frozen=True)
class Readings:
    """T tokens of the right answers of Q tasks, n experts, L = len(GRID) values of λ.

    log_probs float32 [L, n, T]: log-probability of the right token, fused at λ with expert i; hits bool [L, n, T]: whether
    it is the most likely one; chosen int64 [T]: the expert that the router chooses; owners int64 [T]: the task.
    """

    log_probs: Floats
    hits: npt.NDArray[np.bool_]
    chosen: npt.NDArray[np.int64]
    owners: npt.NDArray[np.int64]

    def save(self, file: Path) -> None:
        """Write an .npz file."""
        np.savez_compressed(file, **asdict(self))

    @classmethod
    def load(cls, file: Path) -> "Readings":
        """Read what `save` wrote."""
        with np.load(file) as arrays:
            return cls(**arrays)

    def method(self, name: str) -> tuple[Floats, npt.NDArray[np.float32]]:
        """(log-probability, hit) of every token under a method, float32 [T] each.

        `lambda:X` is FusionRoute; `expert:I` an expert alone; `routed-once` the expert of the answer's first token for all
        of it; `random:X` the mean over all choices of experts; `oracle:X` the choice that gives the right token the
        highest probability. X is λ.
        """
        kind, _, argument = name.partition(":")
        if kind == "expert":
            row, choice = 0, np.full(len(self.chosen), int(argument))
        elif kind == "routed-once":
            firsts = np.unique(self.owners, return_index=True)[1]
            row, choice = 0, self.chosen[firsts][np.unique(self.owners, return_inverse=True)[1]]
        else:
            row, choice = GRID.index(float(argument)), self.chosen
        if kind == "random":
            return self.log_probs[row].mean(0), self.hits[row].mean(0, dtype=np.float32)
        if kind == "oracle":
            choice = self.log_probs[row].argmax(0)
        tokens = np.arange(len(choice))
        return self.log_probs[row, choice, tokens], self.hits[row, choice, tokens].astype(np.float32)

    def per_task(self, values: Floats) -> npt.NDArray[np.float64]:
        """The mean of a task's tokens, for every task [Q]."""
        return np.bincount(self.owners, values) / np.bincount(self.owners)


def read(bundle: Path, precision: str, tasks: Sequence[Task], progress: Progress) -> Readings:
    """Read the right answers of some tasks, as the user's message of a conversation, through an exported system."""
    parts: list[tuple[Floats, npt.NDArray[np.bool_], npt.NDArray[np.int64]]] = []
    with FusionRuntime.load(bundle, precision, "cpu") as runtime:
        assert runtime.tokenizer is not None
        bar = progress.add_task(f"reading, {precision}", total=len(tasks))
        caches = [model.cache() for model in (runtime.backend.router, *runtime.backend.experts)]
        end = runtime.bundle.manifest.eos_token_ids[0]
        for task in tasks:
            prompt = runtime.prompt_ids([{"role": "user", "content": task.prompt}])
            answer = [*runtime.tokenizer.encode(task.answer, special=False), end]
            positions = list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
            for cache in caches:
                cache.length = 0
            router, *experts = [cache.forward([*prompt, *answer[:-1]], positions) for cache in caches]
            assert router.routing is not None
            fused = [_fused(router.logits, expert.logits, np.asarray(answer)) for expert in experts]
            log_probs, hits = (np.stack(own, 1) for own in zip(*fused, strict=True))
            parts.append((log_probs, hits, router.routing.argmax(-1)))
            progress.advance(bar)
    log_probs, hits, chosen = (np.concatenate(own, -1) for own in zip(*parts, strict=True))
    owners = np.repeat(np.arange(len(parts)), [len(part[2]) for part in parts])
    return Readings(log_probs, hits, chosen.astype(np.int64), owners)


def _fused(router: Floats, expert: Floats, labels: npt.NDArray[np.int64]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Log-probability and hit of the labels [S], for every λ: [L, S] each. Logits are float32 [S, V]."""
    blocks = [slice(start, start + BLOCK) for start in range(0, len(labels), BLOCK)]
    rows = [
        _labelled(np.float32(lam) * router[block] + np.float32(1 - lam) * expert[block], labels[block]) for lam in GRID for block in blocks
    ]
    log_probs, hits = (np.concatenate(own).reshape(len(GRID), -1) for own in zip(*rows, strict=True))
    return log_probs, hits


def _labelled(logits: Floats, labels: npt.NDArray[np.int64]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    top = logits.max(-1)
    values = logits[np.arange(len(labels)), labels]
    sums = np.exp(logits - top[:, None]).sum(-1)
    return values - top - np.log(sums), values == top
