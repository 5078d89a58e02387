"""What bundles are evaluated on: the synthetic domains, or prompts and references from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fusionroute.fr_export.evaluation.outcomes import Question
from fusionroute.runtime.errors import InputError

Tasks = dict[str, Sequence[Question]]
"""domain → questions."""


class Line(NamedTuple):
    """A question from a file."""

    prompt: str
    answer: str


def read_tasks(path: Path, count: int, seed: int) -> Tasks:
    """Questions by domain from JSON lines {"prompt": str, "answer": str, "domain": str}, at most `count` of each domain.

    Of more, a seeded choice in the file's order. Raises InputError, naming file and line, for what cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"{path} cannot be read ({reason}): name a file of JSON lines with prompt, answer and domain.") from error
    found: dict[str, list[Line]] = {}
    for number, text in enumerate(lines, start=1):
        if text.strip():
            domain, line = _line(text, f"{path}:{number}")
            found.setdefault(domain, []).append(line)
    if not found:
        raise InputError(f'{path} holds no prompts: expected JSON lines such as {{"prompt": "1+1=", "answer": "2", "domain": "math"}}.')
    rng = random.Random(seed)
    return {domain: [own[i] for i in sorted(rng.sample(range(len(own)), min(count, len(own))))] for domain, own in found.items()}


def _line(text: str, where: str) -> tuple[str, Line]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is no JSON ({error}): expected one object per line.") from error
    names = ("prompt", "answer", "domain")
    if not isinstance(fields, dict) or not all(isinstance(fields.get(name), str) for name in names):
        raise InputError(f'{where} lacks a string "prompt", "answer" or "domain": every line needs all three.')
    if not fields["prompt"]:
        raise InputError(f"{where} has an empty prompt: give it at least one character.")
    return fields["domain"], Line(fields["prompt"], fields["answer"])
