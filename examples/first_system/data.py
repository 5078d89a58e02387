"""Write the training data of "Your first own system in ten minutes": `python data.py FOLDER`.

math.jsonl, code.jsonl and form.jsonl are for the experts; all.jsonl, for the router, holds some of each. Each row is a
question and its answer, as `fusionroute train --sft` reads them. A seed makes them the same every time.
"""

import json
import random
import sys
from pathlib import Path

ROWS = 240  # in each file
NAMES = ("Ada", "Ben", "Chen", "Dana", "Elif", "Femi", "Goran", "Hana")
THINGS = ("apples", "books", "coins", "stamps", "pens", "shells")
OPERATIONS = {  # what a function does → its expression
    "doubles a number": "2 * x",
    "squares a number": "x * x",
    "negates a number": "-x",
    "halves a number": "x / 2",
    "adds one to a number": "x + 1",
    "tells whether a number is even": "x % 2 == 0",
    "returns the length of a list": "len(x)",
    "reverses a list": "x[::-1]",
    "returns the last element of a list": "x[-1]",
    "turns a text into upper case": "x.upper()",
}
FRUITS = ("apple", "banana", "cherry", "fig", "grape", "lemon", "mango", "pear")


def sums(draw: random.Random) -> tuple[str, str]:
    """Plain sums and short word problems."""
    a, b = draw.randint(2, 60), draw.randint(2, 40)
    if draw.random() < 0.5:
        return f"What is {a} plus {b}?", f"{a} + {b} = {a + b}"
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    return f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?", f"{a} + {b} = {a + b} {thing}"


def functions(draw: random.Random) -> tuple[str, str]:
    """One-line Python functions."""
    task = draw.choice(list(OPERATIONS))
    name = draw.choice(("f", "change", "convert", "solve"))
    return f"Write a Python function {name} that {task}.", f"def {name}(x):\n    return {OPERATIONS[task]}"


def forms(draw: random.Random) -> tuple[str, str]:
    """Answers in a given form."""
    words = draw.sample(FRUITS, 3)
    named = f"{words[0]}, {words[1]} and {words[2]}"
    form = draw.choice(("json", "upper", "list"))
    if form == "json":
        return f"Return {named} as a JSON list.", json.dumps(words)
    if form == "upper":
        return f"Write {named} in upper case, one per line.", "\n".join(word.upper() for word in words)
    return f"Write {named} as a bullet list.", "\n".join(f"- {word}" for word in words)


def main(folder: Path) -> None:
    """Write the four files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    everything = []
    for name, question in (("math", sums), ("code", functions), ("form", forms)):
        rows = [row(*question(draw)) for _ in range(ROWS)]
        write(folder / f"{name}.jsonl", rows)
        everything += rows
    draw.shuffle(everything)
    write(folder / "all.jsonl", everything[:ROWS])


def row(question: str, answer: str) -> str:
    """One line: a conversation of one question and one answer."""
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


def write(file: Path, rows: list[str]) -> None:
    """Write lines to a file."""
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/first_system/data.py FOLDER")
    main(Path(sys.argv[1]))
