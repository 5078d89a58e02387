"""Fuzz one parser, guided by coverage: `python -m tests.attacks.fuzz TARGET [-runs=N] [-max_total_time=S] [FOLDER…]`.

TARGET is a name of `targets.TARGETS`. What follows goes to libFuzzer: https://llvm.org/docs/LibFuzzer.html#options. It
begins with small files of each kind, changes their bytes or (half of the time) what they say, and keeps what it finds in
a FOLDER, if one is named. The first input that a parser does not bear ends it with a traceback, and is written to
`crash-…`. Needs the package atheris, in an environment of its own.
"""

import random
import sys
import tempfile
from pathlib import Path

from tests.attacks.fuzz.mutations import mutated
from tests.attacks.fuzz.seeds import SEEDS


def main() -> None:
    """It exits itself."""
    import atheris

    with atheris.instrument_imports(include=["fusionroute.runtime"]):
        from tests.attacks.fuzz.targets import TARGETS

    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"{__doc__}\nexpected one of {', '.join(TARGETS)}")
    name = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(SEEDS[name]):
            (Path(folder) / f"seed-{number}").write_bytes(seed)

        def mutate(content: bytes, most: int, seed: int) -> bytes:
            draw = random.Random(seed)
            changed = mutated(name, content, draw) if draw.random() < 0.5 else atheris.Mutate(content, most)
            return bytes(changed[:most])

        atheris.Setup([*sys.argv, folder], TARGETS[name], custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
