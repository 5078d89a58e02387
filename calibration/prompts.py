"""Prompts to calibrate and compare on: the built-in set, or the user's file."""

import json
from pathlib import Path

from runtime.errors import InputError, one_line

BUILTIN = (
    "12+30=",
    "A farmer has 14 hens and buys 9 more. Each hen lays 2 eggs a day. How many eggs are there after one day? Let us count step by step.",
    "def total(prices):\n    result = 0\n    for price in prices:\n        result += price\n    return result\n\nprint(total([3, 5, 8]))",
    "List three colours of the rainbow, one per line, in capital letters.",
    "The river rose slowly during the night, and by morning the lower meadow was under water. Nobody in the village was surprised.",
    "Answer with a JSON object that has the keys name and age for a person called Ada who is 36 years old.",
    "x = [n * n for n in range(6) if n % 2 == 0]\n# the value of x is",
    "Solve for y: 3y - 7 = 20. Then write the answer as a full sentence.",
)


def load_prompts(source: str = "builtin") -> list[str]:
    """Prompts from `builtin`, a .txt file (one per line), or a .jsonl file (a string, or an object with "prompt" or "text", per line).

    Raises InputError naming the file and line that cannot be used.
    """
    if source == "builtin":
        return list(BUILTIN)
    path = Path(source)
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"--calibration {source} is neither 'builtin' nor a .txt or .jsonl file.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # which newlines end lines is told by read_text; JSON strings may hold others
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The prompts {path} cannot be read ({one_line(error)}); expected a UTF-8 text file.") from error
    prompts = [prompt_of(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not prompts:
        raise InputError(f"{path} holds no prompts: expected at least one line.")
    return prompts


def prompt_of(path: Path, number: int, line: str) -> str:
    """The prompt on one line of a file."""
    if path.suffix == ".txt":
        return line
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"Line {number} of {path} is not JSON ({one_line(error)}); expected one JSON string or object per line."
        ) from error
    text = value if isinstance(value, str) else (value.get("prompt") or value.get("text")) if isinstance(value, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"Line {number} of {path} holds no prompt: expected a string, or an object with a string 'prompt' or 'text'.")
    return text
