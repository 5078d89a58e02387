"""The questions that bundles are evaluated on: prompts with references, by domain."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.strict_json import why_no_json


class Question(Protocol):
    """A prompt and the exact text that counts as right. The samples of `fr_export.tasks` are questions too."""

    @property
    def prompt(self) -> str:
        """The text that the system continues."""
        ...

    @property
    def answer(self) -> str:
        """The reference."""
        ...


class FileQuestion(NamedTuple):
    """A question from a file."""

    prompt: str
    answer: str


Questions = Mapping[str, Sequence[Question]]
"""domain → questions."""


def digest(questions: Sequence[Question], chat: bool) -> str:
    """16 hex digits that stand for the prompts, the references and whether the chat template is used."""
    content = json.dumps([chat, [[question.prompt, question.answer] for question in questions]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_questions(path: Path, count: int, seed: int) -> dict[str, list[FileQuestion]]:
    """Questions by domain from JSON lines, at most `count` of each domain.

    A line is {"prompt": str, "answer": str, "domain": str}. Of more than `count` a seeded choice is taken, in the
    file's order. Raises InputError, naming file and line, for what cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"{path} cannot be read ({reason}): name a file of JSON lines with prompt, answer and domain.") from error
    questions: dict[str, list[FileQuestion]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            domain, question = _parse(line, f"{path}:{number}")
            questions.setdefault(domain, []).append(question)
    if not questions:
        raise InputError(f'{path} holds no prompts: expected JSON lines such as {{"prompt": "1+1=", "answer": "2", "domain": "math"}}.')
    rng = random.Random(seed)
    return {domain: [own[i] for i in sorted(rng.sample(range(len(own)), min(count, len(own))))] for domain, own in questions.items()}


def _parse(line: str, where: str) -> tuple[str, FileQuestion]:
    """The domain and the question on one line."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is no JSON, since {why_no_json(line, error)}: expected one object per line.") from error
    names = ("prompt", "answer", "domain")
    if not isinstance(fields, dict) or not all(isinstance(fields.get(name), str) for name in names):
        raise InputError(f'{where} lacks a string "prompt", "answer" or "domain": every line needs all three.')
    if not fields["prompt"]:
        raise InputError(f"{where} has an empty prompt: give it at least one character.")
    return fields["domain"], FileQuestion(fields["prompt"], fields["answer"])
