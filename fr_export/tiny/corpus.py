"""The training files of the shipped systems: samples of the domains as JSON lines, plain or as conversations."""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fusionroute.fr_export.tasks.domains import Sample, draw
from fusionroute.fr_export.tasks.mistakes import mistake

_PLAIN, _CHAT, _LONG_CHAT = 0.8, 0.17, 0.03  # shares of the kinds of rows; plain ones cost the fewest tokens per answer


def write_sft(file: Path, mix: Mapping[str, float], rows: int, seed: int) -> None:
    """Write `rows` supervised examples of domains drawn by the weights in `mix`.

    An example has one answer, or is a conversation of two to four.
    """
    _write(file, (_example(mix, rng) for rng in _each(rows, f"sft/{seed}")))


def write_preferences(file: Path, mix: Mapping[str, float], rows: int, seed: int) -> None:
    """Write `rows` preference pairs: the right answer against one with a mistake in it."""
    _write(file, (_pair(mix, rng) for rng in _each(rows, f"preferences/{seed}")))


def _each(rows: int, name: str) -> Iterator[random.Random]:
    rng = random.Random(name)
    for _ in range(rows):
        yield rng


def _write(file: Path, lines: Iterator[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)


def _example(mix: Mapping[str, float], rng: random.Random) -> dict[str, Any]:
    kind = rng.choices(("plain", "chat", "long"), (_PLAIN, _CHAT, _LONG_CHAT))[0]
    if kind == "plain":
        sample = _sample(mix, rng)
        return {"prompt": sample.prompt, "completion": sample.answer}
    turns = [_sample(mix, rng) for _ in range(rng.randint(2, 4) if kind == "long" else 1)]
    return {"messages": [message for turn in turns for message in (*_user(turn), _assistant(turn.answer))]}


def _pair(mix: Mapping[str, float], rng: random.Random) -> dict[str, Any]:
    sample = _sample(mix, rng)
    right, wrong = sample.answer, mistake(sample, rng)
    if rng.random() < _PLAIN:
        return {"prompt": sample.prompt, "chosen": right, "rejected": wrong}
    return {"prompt": _user(sample), "chosen": [_assistant(right)], "rejected": [_assistant(wrong)]}


def _sample(mix: Mapping[str, float], rng: random.Random) -> Sample:
    return draw(rng.choices(list(mix), list(mix.values()))[0], "train", rng)


def _user(sample: Sample) -> list[dict[str, str]]:
    return [{"role": "user", "content": sample.prompt}]


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
