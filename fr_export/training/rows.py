"""Samples as rows of token ids: plain text or conversations of one or several turns, batched by similar length."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fr_export.training.architectures import Family
from fr_export.training.domains import DOMAINS, Sample, draw
from fr_export.training.losses import IGNORE

PROMPT = -1  # owner of the tokens that are given, not learnt
_POOL = 1024  # rows that are sorted by length together
_PLAIN, _CHAT, _LONG_CHAT = 0.8, 0.17, 0.03  # shares of the three kinds of rows; plain ones cost the least per answer


@dataclass(frozen=True)
class Row:
    """One sequence; `owners` names for each token the index of its answer's domain, or PROMPT."""

    ids: list[int]
    owners: list[int]


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: `ids` and `labels` are int64 [B, S], `labels` already shifted, IGNORE where nothing is learnt.

    Padding comes last and attention is causal, so no attention mask is needed.
    """

    ids: Tensor
    labels: Tensor
    owners: Tensor  # of the labels, PROMPT where there is none


class Encoder:
    """Turns samples into rows. Prompt and answer are tokenised apart, as they are when a model generates."""

    def __init__(self, tokenizer: Any, family: Family) -> None:
        self._tokenizer = tokenizer
        self._family = family
        self._known: dict[str, list[int]] = {}

    def row(self, turns: Sequence[Sample], *, chat: bool) -> Row:
        """A conversation over the given turns, or (chat=False) the plain text of the only one."""
        family = self._family
        ids: list[int] = []
        owners: list[int] = []

        def add(text: str, owner: int) -> None:
            new = self._encode(text)
            ids.extend(new)
            owners.extend([owner] * len(new))

        for i, sample in enumerate(turns):
            before = family.between if i else family.bos
            if chat:
                add(
                    f"{before}{family.user_open}{sample.prompt}{family.end_of_turn}{family.between}{family.model_open}",
                    PROMPT,
                )
            else:
                add(f"{before}{sample.prompt}", PROMPT)
            for domain, text in sample.parts:
                add(text, DOMAINS.index(domain))
            add(family.end_of_turn if chat else family.eos, owners[-1])
        return Row(ids, owners)

    def _encode(self, text: str) -> list[int]:
        if len(text) > 24:
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        if text not in self._known:
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]


def collate(rows: Sequence[Row], only: int | None = None) -> Batch:
    """Pad the rows; with `only`, nothing but the answer tokens of that domain is learnt."""
    length = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (length - len(row.ids)) for row in rows])
    owners = torch.tensor([row.owners[1:] + [PROMPT] * (length + 1 - len(row.owners)) for row in rows])
    learnt = owners != PROMPT if only is None else owners == only
    return Batch(ids, torch.where(learnt, ids.roll(-1, dims=1), IGNORE), owners)


def batches(encoder: Encoder, mix: dict[str, float], seed: int, tokens: int, only: int | None = None) -> Iterator[Batch]:
    """Endless training batches of about `tokens` tokens each, of domains drawn by the weights in `mix`."""
    rng = random.Random(seed)
    names, weights = list(mix), list(mix.values())

    def fresh() -> Sample:
        while True:
            sample = draw(rng.choices(names, weights)[0], "train", rng)
            if only is None or DOMAINS[only] in dict(sample.parts):
                return sample

    while True:
        pool = []
        for _ in range(_POOL):
            kind = rng.choices(("plain", "chat", "long"), (_PLAIN, _CHAT, _LONG_CHAT))[0]
            turns = [fresh() for _ in range(rng.randint(2, 4) if kind == "long" else 1)]
            pool.append(encoder.row(turns, chat=kind != "plain"))
        pool.sort(key=lambda row: len(row.ids))
        found: list[Batch] = []
        start = 0
        while start < _POOL:
            stop = start + 1
            while stop < _POOL and len(pool[stop].ids) * (stop - start + 1) <= tokens:
                stop += 1
            found.append(collate(pool[start:stop], only))
            start = stop
        rng.shuffle(found)
        yield from found
