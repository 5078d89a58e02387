"""The domains that the shipped systems are trained and tested on.

Three have checkable answers; composite prompts need two of them.

Every draw is seeded. Training, validation and test are disjoint by construction: a hash of the prompt decides its
split, and a training answer may not even contain a held-out expression as a step. Composite prompts are made of parts
of their own split. One kind of composite, a code prompt with an instruction prompt, is never trained on.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fusionroute.fr_export.tasks.generators import TASKS, WORDS, Draw, Task, addition, subtraction

Split = Literal["train", "validation", "test"]

DOMAINS = ("math", "code", "instruction")
COMPOSITE, UNSEEN = "composite", "unseen"
PAIRED = "paired"  # two prompts of one domain, for training only: they teach that a prompt may ask for two things
ALL_DOMAINS = (*DOMAINS, COMPOSITE, UNSEEN)
# of 24 equal shares of all prompts; the others are for training
_SHARES: dict[int, Split] = {0: "test", 1: "test", 2: "validation"}
_PAIRS = {
    PAIRED: tuple((domain, domain) for domain in DOMAINS),
    COMPOSITE: (("math", "code"), ("code", "math"), ("math", "instruction"), ("instruction", "math")),
    UNSEEN: (("code", "instruction"), ("instruction", "code")),
}


@dataclass(frozen=True)
class Sample:
    """One prompt and the exact text that counts as right; `parts` names the domain of each piece of the answer."""

    prompt: str
    parts: tuple[tuple[str, str], ...]
    domain: str

    @property
    def answer(self) -> str:
        """The whole answer."""
        return "".join(text for _, text in self.parts)


def split_of(prompt: str) -> Split:
    """The split that the hash of a single-domain prompt puts it in."""
    return _SHARES.get(int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 24, "train")


def belongs(task: Task, split: Split) -> bool:
    """Whether a task may be used in the split. In training all steps of its answer must be for training too."""
    return split_of(task.prompt) == split and (split != "train" or all(split_of(fact) == "train" for fact in task.facts))


def draw(domain: str, split: Split, rng: random.Random) -> Sample:
    """One random sample of a domain (of ALL_DOMAINS, or PAIRED) from the split.

    Raises ValueError for a training sample of the unseen composites.
    """
    if domain == UNSEEN and split == "train":
        raise ValueError("the unseen composites are never trained on")
    if domain in DOMAINS:
        return Sample(*_single(domain, split, rng), domain)
    if domain == COMPOSITE and rng.random() < 1 / 3:
        return _json_total(split, rng)
    first, second = rng.choice(_PAIRS[domain])
    (first_prompt, ((_, answer),)), (second_prompt, parts) = _single(first, split, rng), _single(second, split, rng)
    return Sample(f"{first_prompt}\n{second_prompt}", ((first, answer + "\n"), *parts), domain)


def draw_many(domain: str, split: Split, count: int, seed: int) -> list[Sample]:
    """`count` different samples; the same arguments always give the same ones."""
    rng = random.Random(f"{domain}/{split}/{seed}")
    samples: dict[str, Sample] = {}  # prompt → sample
    while len(samples) < count:
        sample = draw(domain, split, rng)
        samples.setdefault(sample.prompt, sample)
    return list(samples.values())


def _task(tasks: Mapping[Draw, float], split: Split, rng: random.Random) -> Task:
    while True:
        task = rng.choices(list(tasks), list(tasks.values()))[0](rng)
        if belongs(task, split):
            return task


def _single(domain: str, split: Split, rng: random.Random) -> tuple[str, tuple[tuple[str, str], ...]]:
    task = _task(TASKS[domain], split, rng)
    return task.prompt, ((domain, task.answer),)


def _json_total(split: Split, rng: random.Random) -> Sample:
    total = _task({addition: 1, subtraction: 1}, split, rng)
    key, value = rng.sample(WORDS, 2)
    parts = (("instruction", f'{{"{key}": "{value}", "total": "'), ("math", total.answer), ("instruction", '"}'))
    return Sample(f"JSON: {key}={value}, total={total.prompt[:-1]}", parts, COMPOSITE)
