"""Instructions about the form of an answer, which a program can check; and sums whose answer has a form.

What is said in a form is free where the instruction leaves it free: any three fruits are right.
"""

import json
import random
import re
from collections.abc import Callable, Sequence

from benchmarks.real_system.math_problems import KINDS as SUMS
from benchmarks.real_system.math_problems import last_number
from benchmarks.real_system.tasks import Draw, Task

GROUPS = {
    "fruits": ["apple", "pear", "plum", "cherry", "banana", "grape", "lemon", "orange", "peach", "melon", "mango", "fig", "kiwi", "apricot"],
    "animals": ["dog", "cat", "horse", "cow", "sheep", "goat", "lion", "tiger", "bear", "wolf", "fox", "rabbit", "mouse", "elephant"],
    "colours": ["red", "blue", "green", "yellow", "orange", "purple", "black", "white", "brown", "grey", "pink"],
    "birds": ["eagle", "owl", "robin", "sparrow", "crow", "swan", "duck", "goose", "stork", "heron", "hawk", "finch"],
    "tools": ["hammer", "saw", "drill", "wrench", "pliers", "chisel", "file", "screwdriver", "axe", "spade", "rake", "level"],
    "countries": ["France", "Spain", "Italy", "Norway", "Japan", "Brazil", "Canada", "Egypt", "Kenya", "India", "Chile", "Poland"],
    "vegetables": ["carrot", "onion", "potato", "tomato", "cabbage", "bean", "pea", "leek", "spinach", "garlic", "beet", "radish"],
    "instruments": ["piano", "violin", "flute", "drum", "guitar", "harp", "trumpet", "cello", "organ", "oboe"],
}  # fmt: skip
SENTENCES = (
    "the cat sleeps on the warm roof", "we meet at the old station", "rain falls on the quiet town", "she reads a long letter",
    "the train leaves at seven", "a small boat crosses the lake", "my brother plants a tree", "the market opens early",
    "snow covers the high hills", "they sing in the evening", "the baker sells fresh bread", "a fox runs through the field",
    "our teacher writes on the board", "the river bends near the mill", "he paints the garden gate", "the moon shines over the sea",
)  # fmt: skip
FIELDS: dict[str, Sequence[str | int]] = {
    "name": ["Anna", "Ben", "Carla", "David", "Emma", "Frank"], "city": ["Rome", "Oslo", "Lima", "Cairo", "Paris", "Delhi"],
    "age": [23, 31, 38, 45, 52, 67], "colour": GROUPS["colours"], "animal": GROUPS["animals"], "fruit": GROUPS["fruits"],
    "country": GROUPS["countries"], "tool": GROUPS["tools"],
}  # fmt: skip
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}
Check = Callable[[str], bool]


def task(prompt: str, answer: str, right: Check) -> Task:
    """A task of the domain instruction. The prompt decides its split."""
    return Task(prompt, answer, "instruction", lambda given: right(given.strip()), f"instruction {prompt}")


def listed(rng: random.Random) -> Task:
    """A number of things as bullet points, numbered, or with commas."""
    group, count = rng.choice([*GROUPS]), rng.choice([*COUNTS])
    items = rng.sample(GROUPS[group], count)
    kind = rng.randrange(3)
    ask = rng.choice((f"Name {COUNTS[count]} {group}", f"List {COUNTS[count]} {group}", f"Give me {COUNTS[count]} {group}"))
    if kind == 0:
        return task(f"{ask} as bullet points.", "\n".join(f"- {item}" for item in items), _lines(count, r"[-*•] \S.*"))
    if kind == 1:
        numbered = "\n".join(f"{n}. {item}" for n, item in enumerate(items, 1))
        return task(f"{ask} as a numbered list.", numbered, _lines(count, r"\d+\. \S.*", numbered=True))
    return task(
        f"{ask}, separated by commas and nothing else.", ", ".join(items), lambda given: _parts(given) == count and "\n" not in given
    )


def _lines(count: int, pattern: str, numbered: bool = False) -> Check:
    def right(given: str) -> bool:
        lines = given.split("\n")
        fits = len(lines) == count and all(re.fullmatch(pattern, line.strip()) for line in lines)
        return fits and (not numbered or all(line.strip().startswith(f"{n}. ") for n, line in enumerate(lines, 1)))

    return right


def _parts(text: str) -> int:
    return len([part for part in text.split(",") if re.fullmatch(r"[\w ]+\.?", part.strip())])


def letter_case(rng: random.Random) -> Task:
    """A sentence in upper or lower case, or with capitals."""
    sentence = rng.choice(SENTENCES) + rng.choice(("", " today", " again", " at last", " every day", " with a friend"))
    name, change = rng.choice((("upper case", str.upper), ("capital letters", str.upper), ("title case", str.title)))
    expected = change(sentence)
    return task(f"Write this in {name}: {sentence}", expected, lambda given: given.rstrip(".") == expected)


def json_object(rng: random.Random) -> Task:
    """Facts in a sentence as a JSON object with given keys."""
    keys = rng.sample([*FIELDS], rng.randint(2, 3))
    values: dict[str, str | int] = {key: rng.choice(FIELDS[key]) for key in keys}
    facts = ", ".join(f"{key} {value}" for key, value in values.items())
    names = " and ".join((", ".join(keys[:-1]), keys[-1]))
    prompt = rng.choice((
        f"Write a JSON object with the keys {names}: {facts}.", f"Turn this into JSON with the keys {names}: {facts}.",
    ))  # fmt: skip
    return task(prompt, json.dumps(values), lambda given: _as_texts(given) == {key: str(value) for key, value in values.items()})


def _as_texts(given: str) -> dict[str, str] | None:
    try:
        value = json.loads(given)
    except (ValueError, RecursionError):
        return None
    return {key: str(item) for key, item in value.items()} if isinstance(value, dict) else None


def wrapped(rng: random.Random) -> Task:
    """A sentence between marks, or repeated."""
    sentence = rng.choice(SENTENCES)
    kind = rng.randrange(4)
    if kind == 0:
        mark = rng.choice(("***", "<<>>", "[]", '""', "()"))
        half = len(mark) // 2 or 1
        left, right = (mark, mark) if mark == "***" else (mark[:half], mark[half:])
        expected = f"{left}{sentence}{right}"
        return task(f"Put {left} before and {right} after this: {sentence}", expected, lambda given: given == expected)
    if kind == 1:
        times = rng.choice((2, 3))
        expected = "\n".join([sentence] * times)
        return task(f"Repeat this {COUNTS[times]} times, each on its own line: {sentence}", expected, lambda given: given == expected)
    words = sentence.split()
    if kind == 2:
        return task(f"Write only the last word of this: {sentence}", words[-1], lambda given: given.rstrip(".") == words[-1])
    expected = rng.choice(("-", "_", "/")).join(words)
    sign = expected[len(words[0])]
    return task(f"Join the words of this with {sign}: {sentence}", expected, lambda given: given == expected)


def sum_in_form(rng: random.Random) -> Task:
    """A problem of the domain math whose answer must have a form: both experts are needed."""
    problem = rng.choices([*SUMS], [*SUMS.values()])[0](rng)
    result = last_number(problem.answer)
    working = problem.answer.rpartition(" The answer")[0]
    kind = rng.randrange(3)
    if kind == 0:
        prompt = f'{problem.prompt} Reply with a JSON object with the keys "working" and "result".'
        answer = json.dumps({"working": working, "result": result})
        right: Check = lambda given: (_as_texts(given) or {}).get("result") == str(result)  # noqa: E731
    elif kind == 1:
        steps = re.findall(r"[^.]+\.", working)
        prompt = f"{problem.prompt} Reply with one bullet point per step."
        answer = "\n".join(f"- {step.strip().rstrip('.')}" for step in steps)
        count = len(steps)
        right = lambda given: _lines(count, r"[-*•] \S.*")(given.strip()) and last_number(given) == result  # noqa: E731
    else:
        prompt, answer = f"{problem.prompt} Write the working first, then RESULT: and the number.", f"{working} RESULT: {result}"
        right = lambda given: f"RESULT: {result}" == given.strip().rstrip(".")[-len(f"RESULT: {result}") :]  # noqa: E731
    return Task(prompt, answer, "composite", right, problem.unit)


KINDS: dict[Draw, float] = {listed: 2, letter_case: 1, json_object: 2, wrapped: 1.5}
COMPOSITE: dict[Draw, float] = {sum_in_form: 1}
