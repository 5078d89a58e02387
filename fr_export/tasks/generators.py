"""The task generators of the three domains: a random generator → a prompt and its only right answer."""

import random
from collections.abc import Callable
from dataclasses import dataclass

NAMES = ["Tom", "Ann", "Bob", "Eve", "Max", "Sam"]
WORDS = "sun cat box red pen cup map hat key dog jam net owl pig toy van bus egg fox gem ink log mud nut oak pie rug sky".split()  # noqa: SIM905
LETTERS = "abcdefghkmnpqrstuvwxyz"


@dataclass(frozen=True)
class Task:
    """One prompt and its answer. `facts` are the prompts of other tasks that are steps of the answer."""

    prompt: str
    answer: str
    facts: tuple[str, ...] = ()


Draw = Callable[[random.Random], Task]


# --- math: sums, differences, products, two steps, word problems ------------------------------------------------------


def _number(rng: random.Random) -> int:
    """An operand. Small ones are more frequent: they teach the columns before the carries."""
    return rng.randrange(10) if rng.random() < 0.25 else rng.randrange(100)


def addition(rng: random.Random) -> Task:
    """`12+30=` → `42`."""
    a, b = _number(rng), _number(rng)
    return Task(f"{a}+{b}=", str(a + b))


def subtraction(rng: random.Random) -> Task:
    """`42-30=` → `12`; never below zero."""
    b, a = sorted((_number(rng), _number(rng)))
    return Task(f"{a}-{b}=", str(a - b))


def product(rng: random.Random) -> Task:
    """`6*7=` → `42`. It is not held out of word problems: a multiplication table is memorised, not derived."""
    a, b = rng.randrange(1, 10), rng.randrange(1, 10)
    return Task(f"{a}*{b}=", str(a * b))


def chain(rng: random.Random) -> Task:
    """`6*7+5=` → `42+5=47`."""
    a, b, c = rng.randrange(1, 10), rng.randrange(1, 10), rng.randrange(10)
    return Task(f"{a}*{b}+{c}=", f"{a * b}+{c}={a * b + c}", (f"{a * b}+{c}=",))


def word_problem(rng: random.Random) -> Task:
    """One sentence about things that are bought, given away or counted in bags; the answer shows the working."""
    name, thing = rng.choice(NAMES), rng.choice(WORDS)
    kind = rng.randrange(3)
    if kind == 0:
        a, b = _number(rng), _number(rng)
        return Task(f"{name} has {a} {thing}s and gets {b}. Total?", f"{a}+{b}={a + b}", (f"{a}+{b}=",))
    if kind == 1:
        b, a = sorted((_number(rng), _number(rng)))
        return Task(f"{name} has {a} {thing}s and gives {b}. Left?", f"{a}-{b}={a - b}", (f"{a}-{b}=",))
    a, b = rng.randrange(1, 10), rng.randrange(1, 10)
    return Task(f"{name} has {a} bags of {b} {thing}s. Total?", f"{a}*{b}={a * b}")


# --- code: evaluating, completing and transforming small Python -------------------------------------------------------


def _digits(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(10) for _ in range(rng.randint(low, high))]


def sort_list(rng: random.Random) -> Task:
    """`sorted([3, 1, 2])` → `[1, 2, 3]`."""
    values = _digits(rng, 2, 5)
    return Task(f"sorted({values})", str(sorted(values)))


def reverse_list(rng: random.Random) -> Task:
    """`[3, 1, 2][::-1]` → `[2, 1, 3]`."""
    values = _digits(rng, 2, 5)
    return Task(f"{values}[::-1]", str(values[::-1]))


def extreme(rng: random.Random) -> Task:
    """`max([3, 1, 2])` → `3`."""
    values = _digits(rng, 2, 5)
    name, function = rng.choice((("max", max), ("min", min)))
    return Task(f"{name}({values})", str(function(values)))


def index(rng: random.Random) -> Task:
    """`[3, 1, 2][0]` → `3`."""
    values = _digits(rng, 2, 5)
    i = rng.randrange(len(values))
    return Task(f"{values}[{i}]", str(values[i]))


def count_up(rng: random.Random) -> Task:
    """`list(range(7, 10))` → `[7, 8, 9]`."""
    start = rng.randrange(96)
    stop = start + rng.randint(2, 4)
    return Task(f"list(range({start}, {stop}))", str(list(range(start, stop))))


def run_program(rng: random.Random) -> Task:
    """Two assignments and a print; the answer is what it prints."""
    a, b = rng.sample(LETTERS, 2)
    x, y = rng.randrange(10), rng.randrange(10)
    shown, value = rng.choice(((a, x), (b, y), (f"{a}, {b}", f"{x} {y}"), (f"{b}, {a}", f"{y} {x}"), (f"max({a}, {b})", max(x, y))))
    return Task(f"{a} = {x}\n{b} = {y}\nprint({shown})", str(value))


def complete_function(rng: random.Random) -> Task:
    """The body of a function from its name and arguments."""
    word = rng.choice(WORDS)
    a, b = rng.sample(LETTERS, 2)
    operator, verb = rng.choice((("+", "add"), ("-", "sub"), ("*", "mul")))
    return Task(f"def {verb}_{word}({a}, {b}):", f"    return {a} {operator} {b}")


def expand_lambda(rng: random.Random) -> Task:
    """A lambda rewritten as a function."""
    word, a = rng.choice(WORDS), rng.choice(LETTERS)
    operator, number = rng.choice("+-*"), rng.randrange(10)
    return Task(f"{word} = lambda {a}: {a} {operator} {number}", f"def {word}({a}):\n    return {a} {operator} {number}")


# --- instruction: formats that can be checked -------------------------------------------------------------------------


def _words(rng: random.Random, low: int = 2, high: int = 4) -> list[str]:
    return rng.sample(WORDS, rng.randint(low, high))


def repeat(rng: random.Random) -> Task:
    """`Repeat 2 times: sun` → `sun sun`."""
    words, times = _words(rng, 1, 3), rng.randint(2, 3)
    return Task(f"Repeat {times} times: {' '.join(words)}", " ".join(words * times))


def reverse_words(rng: random.Random) -> Task:
    """`Reverse the words: sun cat` → `cat sun`."""
    words = _words(rng, 2, 5)
    return Task(f"Reverse the words: {' '.join(words)}", " ".join(words[::-1]))


def upper_case(rng: random.Random) -> Task:
    """`Uppercase: sun` → `SUN`."""
    words = _words(rng, 1, 4)
    return Task(f"Uppercase: {' '.join(words)}", " ".join(words).upper())


def number_items(rng: random.Random) -> Task:
    """`Number the items: sun, cat` → a numbered list."""
    words = _words(rng)
    return Task(f"Number the items: {', '.join(words)}", "\n".join(f"{i}. {w}" for i, w in enumerate(words, 1)))


def join_words(rng: random.Random) -> Task:
    """`Join with dashes: sun cat` → `sun-cat`."""
    words = _words(rng, 2, 5)
    name, mark = rng.choice((("dashes", "-"), ("commas", ", ")))
    return Task(f"Join with {name}: {' '.join(words)}", mark.join(words))


def write_json(rng: random.Random) -> Task:
    """`JSON: sun=cat, box=red` → an object."""
    words = _words(rng, 4, 4)
    prompt = f"JSON: {words[0]}={words[1]}, {words[2]}={words[3]}"
    return Task(prompt, f'{{"{words[0]}": "{words[1]}", "{words[2]}": "{words[3]}"}}')


TASKS: dict[str, dict[Draw, float]] = {
    "math": {addition: 4, subtraction: 3, product: 1, chain: 1, word_problem: 3},
    "code": {
        sort_list: 2, reverse_list: 1, extreme: 2, index: 1.5, count_up: 1.5, run_program: 1.5, complete_function: 1.5, expand_lambda: 1.5
    },
    "instruction": {repeat: 1, reverse_words: 2, upper_case: 2, number_items: 1, join_words: 1.5, write_json: 1},
}  # fmt: skip
"""Domain → its tasks, each with its relative frequency."""
