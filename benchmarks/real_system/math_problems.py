"""Arithmetic in words: templates with numbers. The answer shows its steps; its last number is what counts."""

import random
import re

from benchmarks.real_system.tasks import Draw, Task

NAMES = ["Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo", "Mia", "Noah", "Olga", "Paul"]
THINGS = ["apples", "books", "coins", "stamps", "marbles", "pencils", "cards", "cookies", "shells", "stickers", "eggs", "tickets"]
BOXES = ["boxes", "bags", "shelves", "rows", "packs", "baskets"]
_NUMBER = re.compile(r"-?\d+")


def last_number(text: str) -> int | None:
    """The last whole number in a text; commas that group thousands do not count."""
    numbers = _NUMBER.findall(text.replace(",", ""))
    return int(numbers[-1]) if numbers else None


def problem(prompt: str, steps: list[str], result: int, unit: str) -> Task:
    """A task whose answer is its steps and its result."""
    return Task(prompt, f"{' '.join(steps)} The answer is {result}.", "math", lambda answer: last_number(answer) == result, f"math {unit}")


def add(rng: random.Random) -> Task:
    """`What is 27 + 58?`"""
    a, b = rng.randrange(10, 500), rng.randrange(10, 500)
    prompt = rng.choice((f"What is {a} + {b}?", f"Calculate {a} + {b}.", f"Add {a} and {b}."))
    return problem(prompt, [f"{a} + {b} = {a + b}."], a + b, f"{a}+{b}")


def subtract(rng: random.Random) -> Task:
    """`What is 58 - 27?`"""
    b, a = sorted((rng.randrange(10, 500), rng.randrange(10, 500)))
    prompt = rng.choice((f"What is {a} - {b}?", f"Calculate {a} - {b}.", f"Subtract {b} from {a}."))
    return problem(prompt, [f"{a} - {b} = {a - b}."], a - b, f"{a}-{b}")


def multiply(rng: random.Random) -> Task:
    """`What is 7 * 34?`, in tens and ones."""
    a, b = rng.randrange(2, 10), rng.randrange(11, 100)
    tens, ones = b // 10 * 10, b % 10
    prompt = rng.choice((f"What is {a} * {b}?", f"Calculate {a} times {b}.", f"Multiply {a} by {b}."))
    steps = [f"{a} * {tens} = {a * tens}. {a} * {ones} = {a * ones}. {a * tens} + {a * ones} = {a * b}."]
    return problem(prompt, steps if ones else [f"{a} * {b} = {a * b}."], a * b, f"{a}*{b}")


def chain(rng: random.Random) -> Task:
    """`What is 6 * 7 + 25?`"""
    a, b, c = rng.randrange(2, 13), rng.randrange(2, 13), rng.randrange(2, 100)
    return problem(f"What is {a} * {b} + {c}?", [f"{a} * {b} = {a * b}. {a * b} + {c} = {a * b + c}."], a * b + c, f"{a}*{b}+{c}")


def gain_and_loss(rng: random.Random) -> Task:
    """Somebody gets some things and gives some away."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randrange(10, 200), rng.randrange(5, 100)
    c = rng.randrange(2, a + b)
    prompt = rng.choice((
        f"{name} has {a} {things}. {name} buys {b} more and gives away {c}. How many {things} does {name} have now?",
        f"{name} had {a} {things}, found {b} and lost {c}. How many {things} are left?",
        f"There are {a} {things} on the table. {name} puts {b} more there and takes {c}. How many {things} are on the table?",
    ))  # fmt: skip
    steps = [f"{a} + {b} = {a + b}.", f"{a + b} - {c} = {a + b - c}."]
    return problem(prompt, steps, a + b - c, f"{a}+{b}-{c}")


def boxes(rng: random.Random) -> Task:
    """Things in equal boxes, and some more."""
    name, things, box = rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES)
    a, b, c = rng.randrange(2, 13), rng.randrange(3, 13), rng.randrange(2, 60)
    prompt = rng.choice((
        f"{name} has {a} {box} of {b} {things} and {c} {things} besides. How many {things} is that in all?",
        f"In each of {a} {box} there are {b} {things}. {name} brings {c} more. How many {things} are there?",
    ))  # fmt: skip
    steps = [f"{a} * {b} = {a * b}.", f"{a * b} + {c} = {a * b + c}."]
    return problem(prompt, steps, a * b + c, f"{a}*{b}+{c}")


def share(rng: random.Random) -> Task:
    """Things that are shared among friends without a rest."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    friends, each = rng.randrange(2, 13), rng.randrange(2, 25)
    total = friends * each
    prompt = rng.choice((
        f"{name} shares {total} {things} equally among {friends} friends. How many does each friend get?",
        f"{total} {things} are put into {friends} equal heaps. How many {things} are in each heap?",
    ))  # fmt: skip
    return problem(prompt, [f"{total} / {friends} = {each}."], each, f"{total}/{friends}")


def price(rng: random.Random) -> Task:
    """What is paid for some things, and the change."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    count, cost = rng.randrange(2, 13), rng.randrange(2, 13)
    paid = rng.choice([note for note in (20, 50, 100, 200) if note >= count * cost])
    prompt = f"{name} buys {count} {things} for {cost} euros each and pays with {paid} euros. How much change does {name} get?"
    steps = [f"{count} * {cost} = {count * cost}.", f"{paid} - {count * cost} = {paid - count * cost}."]
    return problem(prompt, steps, paid - count * cost, f"{paid}-{count}*{cost}")


KINDS: dict[Draw, float] = {add: 2, subtract: 2, multiply: 1.5, chain: 1, gain_and_loss: 2, boxes: 1.5, share: 1, price: 1}
