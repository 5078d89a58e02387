"""Prompts to calibrate and to report on: the built-in set, or the user's file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusionroute.runtime.errors import InputError, one_line
from fusionroute.runtime.strict_json import why_no_json

HELD_OUT_EVERY = 5  # of so many prompts one is held out of calibration


def shipped(name: str) -> tuple[str, ...]:
    """The texts of `data/NAME.jsonl`, one JSON string per line."""
    text = (Path(__file__).parent / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


BUILTIN = shipped("builtin")  # short beginnings that the system continues
HELD_OUT = shipped("held_out")  # whole texts to report on; calibration never sees them


@dataclass(frozen=True)
class Parts:
    """Texts to calibrate on, and texts to report on.

    `note` is a sentence for the user where these are the same, else None.
    """

    calibration: list[str]
    held_out: list[str]
    note: str | None = None


def load_parts(source: str = "builtin") -> Parts:
    """The prompts of a source in two parts that share no text; the built-in set has held-out texts of its own.

    A saved table (.safetensors) and `none` need no prompts to calibrate on: the held-out texts are the built-in ones.
    Raises InputError as `load_prompts` does.
    """
    if source == "builtin":
        return Parts(list(BUILTIN), list(HELD_OUT))
    if source == "none" or source.endswith(".safetensors"):
        return Parts([], list(HELD_OUT))
    return divide(load_prompts(source))


def divide(prompts: Sequence[str]) -> Parts:
    """Hold out every fifth of the different prompts, or the last one where they are fewer. A single prompt serves both.

    Raises InputError where there is none.
    """
    different = list(dict.fromkeys(prompts))
    if not different:
        raise InputError("There are no prompts to divide: expected at least one.")
    if len(different) == 1:
        note = "There is a single prompt, so the report is measured on the text of the calibration: give two or more prompts to tell them apart."
        return Parts(different, different, note)
    held_out = different[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or different[-1:]
    return Parts([prompt for prompt in different if prompt not in held_out], held_out)


def load_prompts(source: str = "builtin") -> list[str]:
    """Prompts from `builtin`, a .txt file or a .jsonl file.

    A .txt file has one prompt per line; a .jsonl file has one string, or one object with "prompt" or "text", per line.
    Raises InputError naming the file and line that cannot be used.
    """
    if source == "builtin":
        return list(BUILTIN)
    path = Path(source)
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(
            f"--calibration {source} is neither 'builtin' nor a .txt or .jsonl file of prompts, nor 'none' or a .safetensors table."
        )
    try:
        # read_text turns all line ends into \n; JSON strings may hold other separators
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The prompts {path} cannot be read ({one_line(error)}); expected a UTF-8 text file.") from error
    prompts = [prompt_of(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not prompts:
        raise InputError(f"{path} holds no prompts: expected at least one line.")
    return prompts


def prompt_of(path: Path, number: int, line: str) -> str:
    """The prompt on one line of a file. Raises InputError where there is none."""
    if path.suffix == ".txt":
        return line
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"Line {number} of {path} is not JSON, since {why_no_json(line, error)}; expected one JSON string or object per line."
        ) from error
    text = value if isinstance(value, str) else (value.get("prompt") or value.get("text")) if isinstance(value, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"Line {number} of {path} holds no prompt: expected a string, or an object with a string 'prompt' or 'text'.")
    return text
