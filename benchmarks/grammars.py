"""What a grammar costs: `python -m benchmarks.grammars BUNDLE [--precision int8] [--tokens 48] [--rounds 9]`.

Texts by a JSON schema, by an expression that takes any text, and without a grammar, by turns: the median ratios of time
and of CPU time per token to those without, and the share of time for which the generating thread waits for a mask, or
applies it. On a machine with other work, the CPU times say more.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fusionroute.runtime import FusionRuntime, Grammar
from fusionroute.runtime.logits_processor import LogitsProcessor

PROMPT = "A list of animals as JSON:\n"
ANIMALS = {
    "type": "object",
    "properties": {"animals": {"type": "array", "items": {"type": "string"}}},
    "required": ["animals"],
    "additionalProperties": False,
}
WAYS: dict[str, dict[str, Any]] = {
    "none": {"ignore_eos": True},
    "JSON schema": {"grammar": Grammar.json_schema(ANIMALS)},
    "any text": {"grammar": Grammar.regex(r"(?s:.*)")},
}


class Clock:
    """Seconds spent in some methods."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Any) -> Any:
        """The method, timed."""

        def run(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - begin

        return run


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    clock = Clock()
    names = ("prepare", "complete", "process")
    patches = [patch.object(LogitsProcessor, name, clock.timed(getattr(LogitsProcessor, name))) for name in names]
    for each in patches:
        each.start()
    ratios: dict[str, list[float]] = {name: [] for name in WAYS}
    cpu: dict[str, list[float]] = {name: [] for name in WAYS}
    shares: dict[str, list[float]] = {name: [] for name in WAYS}
    with FusionRuntime.load(given.bundle, given.precision, "cpu") as rt:
        for number in range(given.rounds + 1):
            seconds, used = {}, {}
            for name, options in WAYS.items() if number % 2 else reversed(WAYS.items()):
                clock.seconds, begin, before = 0.0, time.perf_counter(), time.process_time()
                count = len(rt.generate(PROMPT, given.tokens, **options).token_ids)
                total = time.perf_counter() - begin
                seconds[name], used[name] = total / count, (time.process_time() - before) / count
                if number:
                    shares[name].append(clock.seconds / total)
            if number:  # the first round compiles the grammars
                for name in WAYS:
                    ratios[name].append(seconds[name] / seconds["none"])
                    cpu[name].append(used[name] / used["none"])
    for name in WAYS:
        print(
            f"{name:<12} {statistics.median(ratios[name]):.3f} of the time per token, {statistics.median(cpu[name]):.3f} of the CPU time, "
            f"{statistics.median(shares[name]):.1%} for masks"
        )


if __name__ == "__main__":
    main()
