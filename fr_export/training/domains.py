"""Three synthetic task domains with checkable answers: math, code, instruction; and prompts that need two of them.

Every draw is seeded. Train and test are disjoint by construction: a hash of the prompt decides which of the two it
belongs to, and a training sample may not even spell out a test expression inside its answer.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]

DOMAINS = ("math", "code", "instruction")
COMPOSITE = "composite"
WORDS = [
    "sun",
    "cat",
    "box",
    "red",
    "pen",
    "cup",
    "map",
    "hat",
    "key",
    "dog",
    "jam",
    "net",
    "owl",
    "pig",
    "toy",
    "van",
    "bus",
    "egg",
    "fox",
    "gem",
    "ink",
    "log",
    "mud",
    "nut",
    "oak",
    "pie",
    "rug",
    "sky",
]
NAMES = ["Tom", "Ann", "Bob", "Eve", "Max", "Sam"]
_TEST_SHARE = 12  # one prompt in twelve is a test prompt


@dataclass(frozen=True)
class Sample:
    """One task: the answer is the concatenation of `parts`, each a (domain, text) pair."""

    prompt: str
    parts: tuple[tuple[str, str], ...]
    domain: str
    facts: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The exact text that counts as right."""
        return "".join(text for _, text in self.parts)


def is_test(prompt: str) -> bool:
    """Whether the hash of this text puts it on the test side."""
    return hashlib.sha256(prompt.encode()).digest()[0] % _TEST_SHARE == 0


def belongs(sample: Sample, split: Split) -> bool:
    """Whether a single-domain sample may be used in the split; `facts` are expressions that its answer works out."""
    if split == "test":
        return is_test(sample.prompt)
    return not any(map(is_test, (sample.prompt, *sample.facts)))


def draw(domain: str, split: Split, rng: random.Random) -> Sample:
    """One random sample of the domain (or of the composites) from the split."""
    if domain == COMPOSITE:
        return rng.choices((_two_lines, _json_total), (2, 1))[0](split, rng)
    tasks = [task for task, _ in _TASKS[domain]]
    weights = [weight for _, weight in _TASKS[domain]]
    while True:
        sample = rng.choices(tasks, weights)[0](rng)
        if belongs(sample, split):
            return sample


def draw_many(domain: str, split: Split, count: int, seed: int) -> list[Sample]:
    """`count` different samples, always the same ones for the same arguments."""
    rng = random.Random(f"{domain}/{split}/{seed}")
    found: dict[str, Sample] = {}
    while len(found) < count:
        sample = draw(domain, split, rng)
        found.setdefault(sample.prompt, sample)
    return list(found.values())


def _one(domain: str, prompt: str, answer: str, facts: tuple[str, ...] = ()) -> Sample:
    return Sample(prompt, ((domain, answer),), domain, facts)


# --- math ---------------------------------------------------------------------------------------------------------


def _number(rng: random.Random) -> int:
    """Small operands weigh more: they teach the columns before the carries."""
    return rng.randrange(10) if rng.random() < 0.25 else rng.randrange(50)


def _sum(rng: random.Random) -> Sample:
    a, b = _number(rng), _number(rng)
    return _one("math", f"{a}+{b}=", str(a + b))


def _difference(rng: random.Random) -> Sample:
    b, a = sorted((_number(rng), _number(rng)))
    return _one("math", f"{a}-{b}=", str(a - b))


def _product(rng: random.Random) -> Sample:
    # Not a fact to hide: a multiplication table can be memorised but not derived, so word problems may state it.
    a, b = rng.randrange(1, 10), rng.randrange(1, 10)
    return _one("math", f"{a}*{b}=", str(a * b))


def _chain(rng: random.Random) -> Sample:
    a, b, c = rng.randrange(1, 10), rng.randrange(1, 10), rng.randrange(10)
    return _one("math", f"{a}*{b}+{c}=", f"{a * b}+{c}={a * b + c}", (f"{a * b}+{c}=",))


def _word_problem(rng: random.Random) -> Sample:
    name, thing = rng.choice(NAMES), rng.choice(WORDS)
    kind = rng.randrange(3)
    if kind == 0:
        a, b = _number(rng), _number(rng)
        return _one("math", f"{name} has {a} {thing}s and gets {b}. Total?", f"{a}+{b}={a + b}", (f"{a}+{b}=",))
    if kind == 1:
        b, a = sorted((_number(rng), _number(rng)))
        return _one("math", f"{name} has {a} {thing}s and gives {b}. Left?", f"{a}-{b}={a - b}", (f"{a}-{b}=",))
    a, b = rng.randrange(1, 10), rng.randrange(1, 10)
    return _one("math", f"{name} has {a} bags of {b} {thing}s. Total?", f"{a}*{b}={a * b}")


# --- code ---------------------------------------------------------------------------------------------------------


def _digits(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(10) for _ in range(rng.randint(low, high))]


def _sorted(rng: random.Random) -> Sample:
    values = _digits(rng, 2, 4)
    return _one("code", f"sorted({values})", str(sorted(values)))


def _reversed(rng: random.Random) -> Sample:
    values = _digits(rng, 2, 4)
    return _one("code", f"{values}[::-1]", str(values[::-1]))


def _extreme(rng: random.Random) -> Sample:
    values = _digits(rng, 2, 4)
    name, function = rng.choice((("max", max), ("min", min)))
    return _one("code", f"{name}({values})", str(function(values)))


def _index(rng: random.Random) -> Sample:
    values = _digits(rng, 2, 4)
    i = rng.randrange(len(values))
    return _one("code", f"{values}[{i}]", str(values[i]))


def _range(rng: random.Random) -> Sample:
    start = rng.randrange(96)
    stop = start + rng.randint(2, 4)
    return _one("code", f"list(range({start}, {stop}))", str(list(range(start, stop))))


def _function(rng: random.Random) -> Sample:
    word = rng.choice(WORDS)
    a, b = rng.sample("abcdefghkmnpqrstuvwxyz", 2)
    operator, verb = rng.choice((("+", "add"), ("-", "sub"), ("*", "mul")))
    return _one("code", f"def {verb}_{word}({a}, {b}):", f"    return {a} {operator} {b}")


def _lambda(rng: random.Random) -> Sample:
    word, a = rng.choice(WORDS), rng.choice("abcdefghkmnpqrstuvwxyz")
    operator, number = rng.choice("+-*"), rng.randrange(10)
    return _one("code", f"{word} = lambda {a}: {a} {operator} {number}", f"def {word}({a}):\n    return {a} {operator} {number}")


# --- instruction --------------------------------------------------------------------------------------------------


def _words(rng: random.Random, low: int = 2, high: int = 4) -> list[str]:
    return rng.sample(WORDS, rng.randint(low, high))


def _repeat(rng: random.Random) -> Sample:
    words, times = _words(rng, 1, 2), rng.randint(2, 3)
    return _one("instruction", f"Repeat {times} times: {' '.join(words)}", " ".join(words * times))


def _reverse(rng: random.Random) -> Sample:
    words = _words(rng)
    return _one("instruction", f"Reverse the words: {' '.join(words)}", " ".join(words[::-1]))


def _upper(rng: random.Random) -> Sample:
    words = _words(rng, 1, 3)
    return _one("instruction", f"Uppercase: {' '.join(words)}", " ".join(words).upper())


def _numbered(rng: random.Random) -> Sample:
    words = _words(rng)
    return _one("instruction", f"Number the items: {', '.join(words)}", "\n".join(f"{i}. {w}" for i, w in enumerate(words, 1)))


def _json(rng: random.Random) -> Sample:
    words = _words(rng, 4, 4)
    return _one(
        "instruction",
        f"JSON: {words[0]}={words[1]}, {words[2]}={words[3]}",
        f'{{"{words[0]}": "{words[1]}", "{words[2]}": "{words[3]}"}}',
    )


# --- two domains in one answer ------------------------------------------------------------------------------------


def _two_lines(split: Split, rng: random.Random) -> Sample:
    first, second = (draw(domain, split, rng) for domain in rng.sample(DOMAINS, 2))
    (domain, text), *_ = first.parts
    return Sample(f"{first.prompt}\n{second.prompt}", ((domain, text + "\n"), *second.parts), COMPOSITE)


def _json_total(split: Split, rng: random.Random) -> Sample:
    while True:
        total = rng.choice((_sum, _difference))(rng)
        if belongs(total, split):
            break
    key, value = rng.sample(WORDS, 2)
    open_text = f'{{"{key}": "{value}", "total": "'
    parts = (("instruction", open_text), ("math", total.answer), ("instruction", '"}'))
    return Sample(f"JSON: {key}={value}, total={total.prompt[:-1]}", parts, COMPOSITE)


_Task = tuple[Callable[[random.Random], Sample], float]
_TASKS: dict[str, tuple[_Task, ...]] = {
    "math": ((_sum, 4), (_difference, 3), (_product, 1), (_chain, 1), (_word_problem, 1)),
    "code": ((_sorted, 2), (_reversed, 1), (_extreme, 2), (_index, 1.5), (_range, 2), (_function, 1.5), (_lambda, 1.5)),
    "instruction": ((_repeat, 1), (_reverse, 2), (_upper, 2), (_numbered, 1), (_json, 1)),
}
