"""Which experts the router chooses where it matters: at tokens that some experts get right and others wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fusionroute.fr_export.evaluation.token_classes import CLASSES, TokenClasses
from fusionroute.fr_export.tasks.domains import Sample
from fusionroute.runtime import FusionRuntime


@dataclass(frozen=True)
class Choices:
    """P informative positions of n experts.

    label int64 [P]: token class; chosen int64 [P]: routed expert; right bool [P, n]: whether an expert's greedy token
    is the answer's.
    """

    label: np.ndarray
    chosen: np.ndarray
    right: np.ndarray

    def save(self, file: Path) -> None:
        """Write an .npz file."""
        np.savez_compressed(file, **asdict(self))

    @classmethod
    def load(cls, file: Path) -> "Choices":
        """Read what `save` wrote."""
        with np.load(file) as arrays:
            return cls(**arrays)

    def table(self, names: Sequence[str]) -> list[tuple[str, int, list[float], float, float]]:
        """Per token class: count, share of each expert, how often the routed and a random expert are right."""
        lines = []
        for number, name in [*enumerate(CLASSES), (None, "all")]:
            positions = np.arange(len(self.label)) if number is None else np.flatnonzero(self.label == number)
            if len(positions):
                shares = [float((self.chosen[positions] == expert).mean()) for expert in range(len(names))]
                hit = float(self.right[positions, self.chosen[positions]].mean())
                lines.append((name, len(positions), shares, hit, float(self.right[positions].mean())))
        return lines


def choices(bundle: str, tasks: Mapping[str, Sequence[Sample]]) -> Choices:
    """Read prompts with their right answers (teacher forced) through the exported router and all experts."""
    labels, chosen, right = [], [], []
    with FusionRuntime.load(bundle, "fp32") as runtime:
        assert runtime.tokenizer is not None
        classes = TokenClasses(runtime.tokenizer)
        caches = [model.cache() for model in (runtime.backend.router, *runtime.backend.experts)]
        for sample in (sample for samples in tasks.values() for sample in samples):
            prompt, answer = runtime.encode(sample.prompt), runtime.tokenizer.encode(sample.answer, special=False)
            positions = list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
            for cache in caches:
                cache.length = 0
            router, *experts = [cache.forward([*prompt, *answer[:-1]], positions) for cache in caches]
            hits = np.stack([own.logits.argmax(-1) == answer for own in experts], -1)
            informative = hits.any(-1) & ~hits.all(-1)
            assert router.routing is not None
            labels.append(np.array(classes.of(answer))[informative])
            chosen.append(router.routing.argmax(-1)[informative])
            right.append(hits[informative])
    return Choices(np.concatenate(labels), np.concatenate(chosen), np.concatenate(right))
