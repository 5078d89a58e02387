"""What the checks of a bundle's files cost: `python -m benchmarks.load_checks BUNDLE [--precision int8] [--rounds 15]`.

Loads in fresh processes, by turns: without the checks, for the first time on a machine (with an empty cache folder), and
again. Prints medians of seconds and of CPU seconds from the start of a load to its end, of decoded tokens per second, and
their ratios to a load without the checks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("unchecked", "first", "again")
TOKENS = 64
Figures = dict[str, float]


def child(way: str, bundle: str, precision: str) -> Figures:
    """Load once in this process, and generate."""
    from contextlib import contextmanager
    from unittest.mock import patch

    from fusionroute.runtime import FusionRuntime, engine

    if way == "unchecked":

        @contextmanager
        def unchecked(*_: object, **__: object):  # type: ignore[no-untyped-def]
            yield lambda: None

        for name in ("begun_trial", "checked"):
            patch.object(engine, name, unchecked).start()
    begin, used = time.perf_counter(), time.process_time()
    runtime = FusionRuntime.load(bundle, precision, "cpu")
    figures = {"seconds": time.perf_counter() - begin, "CPU seconds": time.process_time() - used + os.times().children_user}
    runtime.generate([5, 6, 7], 8)
    begin = time.perf_counter()
    session = runtime.session()
    session.append([5, 6, 7])
    for _ in range(TOKENS):
        session.step()
    return figures | {"tokens/s": TOKENS / (time.perf_counter() - begin)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(child(given.way, str(given.bundle), given.precision)))
        return
    seen: dict[str, list[Figures]] = {way: [] for way in WAYS}
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for way in WAYS:  # in this order: `first` leaves what `again` finds
                command = [sys.executable, "-m", "benchmarks.load_checks", str(given.bundle), "--precision", given.precision, "--way", way]
                ended = subprocess.run(command, env=os.environ | {"XDG_CACHE_HOME": cache}, capture_output=True, text=True, check=True)
                seen[way].append(json.loads(ended.stdout))
    for way in WAYS:
        for name in seen[way][0]:
            value = statistics.median(figures[name] for figures in seen[way])
            ratio = statistics.median(mine[name] / other[name] for mine, other in zip(seen[way], seen["unchecked"], strict=True))
            print(f"{way:<10} {name:<12} {value:9.3f}  {ratio:6.3f} of unchecked")


if __name__ == "__main__":
    main()
