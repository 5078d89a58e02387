"""Which rows form a batch, in which order, and the tensors of a batch."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusionroute.fr_export.training.data import Pair, Row

_POOL = 1024  # samples that are sorted by length together: little padding, and still well shuffled


@dataclass(frozen=True)
class Samples:
    """Rows to learn from, and the experts' scores of their T learnt tokens, concatenated row by row.

    With preferences the rows alternate: chosen, rejected. `expert_log_probs` is float32 [N, T], `informative` bool [T],
    `reference` float32 [T] (log π_ref, of preferences); None where there are no experts or no reference.
    """

    rows: Sequence[Row]
    preferred: bool
    expert_log_probs: npt.NDArray[np.float32] | None = None
    informative: npt.NDArray[np.bool_] | None = None
    reference: npt.NDArray[np.float32] | None = None

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """int64 [rows + 1]: the learnt tokens of row r are starts[r] to starts[r + 1] of all T."""
        return np.cumsum([0, *(len(row.positions) for row in self.rows)])

    @cached_property
    def costs(self) -> list[int]:
        """Tokens that each sample fills in a batch: its length, or twice the longer of its two rows."""
        lengths = [len(row.ids) for row in self.rows]
        if not self.preferred:
            return lengths
        return [2 * max(pair) for pair in zip(lengths[::2], lengths[1::2], strict=True)]

    def collate(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these samples: B rows of S tokens, padded at the end.

        Attention is causal, so no mask is needed. `ids` int64 [B, S]; `positions` int64 [T], into the flattened rows;
        `labels` int64 [T], the tokens that come after them; `owners` int64 [T], the row of each; and the scores of
        these tokens as tensors [N, T] or [T]. Of P pairs, all chosen answers come first, then all rejected ones: B =
        2P.
        """
        order = [2 * n for n in numbers] + [2 * n + 1 for n in numbers] if self.preferred else list(numbers)
        rows = [self.rows[n] for n in order]
        length = max(len(row.ids) for row in rows)
        ids = np.zeros((len(rows), length), np.int64)
        for padded, row in zip(ids, rows, strict=True):
            padded[: len(row.ids)] = row.ids
        tokens = np.concatenate([np.arange(self.starts[n], self.starts[n + 1]) for n in order])
        batch = {
            "ids": torch.from_numpy(ids),
            "positions": torch.from_numpy(np.concatenate([row.positions + b * length for b, row in enumerate(rows)])),
            "labels": torch.from_numpy(np.concatenate([row.labels for row in rows]).astype(np.int64)),
            "owners": torch.from_numpy(np.repeat(np.arange(len(rows)), [len(row.positions) for row in rows])),
        }
        for name in ("expert_log_probs", "informative", "reference"):
            if (scores := getattr(self, name)) is not None:
                batch[name] = torch.from_numpy(scores[..., tokens])
        return batch


@dataclass(frozen=True)
class Batch:
    """One batch before it becomes tensors: the numbers of its samples in a set."""

    samples: Samples
    numbers: Sequence[int]


def flat(pairs: Sequence[Pair]) -> list[Row]:
    """The rows of pairs as `Samples` expects them: chosen and rejected alternate."""
    return [row for pair in pairs for row in pair]


def optimizer_steps(
    sets: Sequence[Samples], size: int, tokens: int | None, per_step: int, epochs: int, max_steps: int | None, seed: int
) -> list[list[Batch]]:
    """The optimizer steps of a stage, each of `per_step` batches of one set.

    The steps of all sets are shuffled together. A batch has `size` samples, or as many as fill `tokens` padded tokens.
    `max_steps` replaces `epochs`. Which samples a step takes does not depend on `per_step`, the number of batches that
    share them; where there are fewer samples than batches some are repeated.
    """
    rng = np.random.default_rng(seed)

    def steps() -> Iterator[list[Batch]]:
        for _ in itertools.count() if max_steps is not None else range(epochs):
            epoch = []
            for samples in sets:
                for numbers in cut(samples.costs, size * per_step, tokens and tokens * per_step, rng):
                    repeated = list(itertools.islice(itertools.cycle(numbers), max(len(numbers), per_step)))
                    epoch.append([Batch(samples, part.tolist()) for part in np.array_split(repeated, per_step)])
            yield from (epoch[n] for n in rng.permutation(len(epoch)))

    return list(itertools.islice(steps(), max_steps))


def cut(costs: Sequence[int], size: int, tokens: int | None, rng: np.random.Generator) -> list[list[int]]:
    """All samples once, in random order, cut into batches of similar length."""
    order = rng.permutation(len(costs))
    pool = -(-_POOL // size) * size
    batches = []
    for start in range(0, len(order), pool):
        batches += by_length(sorted(order[start : start + pool].tolist(), key=lambda n: costs[n]), costs, size, tokens)
    return batches


def by_length(order: Sequence[int], costs: Sequence[int], size: int, tokens: int | None) -> list[list[int]]:
    """Cut samples, sorted by rising cost, into batches.

    A batch has `size` samples, or as many as fill `tokens` padded tokens, and at least one.
    """
    batches: list[list[int]] = []
    for number in order:
        last = batches[-1] if batches else []
        fits = len(last) < size if tokens is None else costs[number] * (len(last) + 1) <= tokens
        if last and fits:
            last.append(number)
        else:
            batches.append([number])
    return batches
