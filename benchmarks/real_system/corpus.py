"""Training files and test prompts, drawn by seeds from the four domains."""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.real_system import formats, library_code, math_problems
from benchmarks.real_system.mistakes import mistake
from benchmarks.real_system.tasks import Draw, Split, Task, draw

EXPERTS = ("math", "code", "instruction")
COMPOSITE = "composite"
DOMAINS = (*EXPERTS, COMPOSITE)
KINDS: dict[str, dict[Draw, float]] = {
    "math": math_problems.KINDS,
    "code": library_code.KINDS,
    "instruction": formats.KINDS,
    COMPOSITE: formats.COMPOSITE,
}
TESTED = KINDS | {"code": library_code.TESTED}
# An expert must not forget that other prompts exist; a router sees everything.
EXPERT_MIX = {name: {name: 0.9, **{other: 0.05 for other in EXPERTS if other != name}} for name in EXPERTS}
ROUTER_MIX = dict.fromkeys(DOMAINS, 1.0)


def prompts_of(domain: str, split: Split, count: int, seed: int) -> list[Task]:
    """Different prompts of a domain; the same arguments give the same ones."""
    rng = random.Random(f"{domain}/{split}/{seed}")
    tasks: dict[str, Task] = {}
    while len(tasks) < count:
        task = draw(TESTED[domain], split, rng)
        tasks.setdefault(task.prompt, task)
    return list(tasks.values())


def write_sft(file: Path, mix: Mapping[str, float], rows: int, seed: int) -> None:
    """Write `rows` conversations of one question and its answer."""
    _write(file, ({"messages": [_user(task), _assistant(task.answer)]} for task in _drawn(mix, rows, f"sft/{seed}")))


def write_preferences(file: Path, rows: int, seed: int) -> None:
    """Write up to `rows` preferences: the right answer against one with a mistake that its check notices."""
    rng = random.Random(f"mistakes/{seed}")
    drawn = _drawn(ROUTER_MIX, rows, f"preferences/{seed}")
    answers = ((task, mistake(task, rng)) for task in drawn)
    _write(file, (
        {"prompt": [_user(task)], "chosen": [_assistant(task.answer)], "rejected": [_assistant(wrong)]}
        for task, wrong in answers
        if wrong is not None
    ))  # fmt: skip


def _drawn(mix: Mapping[str, float], count: int, seed: str) -> Iterator[Task]:
    rng = random.Random(seed)
    for _ in range(count):
        domain = rng.choices(list(mix), list(mix.values()))[0]
        yield draw(KINDS[domain], "train", rng)


def _write(file: Path, lines: Iterator[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    partial.rename(file)


def _user(task: Task) -> dict[str, str]:
    return {"role": "user", "content": task.prompt}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
