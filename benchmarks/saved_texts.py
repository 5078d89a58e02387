"""How long a long prompt takes that is read, and one that a session loads. Prints one line of a table.

python -m benchmarks.saved_texts BUNDLE [--precision int8] [--length 4000]

The router and one expert have read it. By turns; the file is in the system's page cache.
"""

import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer

from benchmarks.real_text import language_reference
from fusionroute.runtime import FusionRuntime

ROUNDS = 3


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle whose context has room for the text.")],
    precision: Annotated[str, typer.Option(help="Precision to load.")] = "int8",
    length: Annotated[int, typer.Option(help="Tokens of text.")] = 4000,
) -> None:
    """Measure reading, saving and loading."""
    seconds: dict[str, list[float]] = {"read": [], "save": [], "load": []}
    with FusionRuntime.load(bundle, precision, "cpu", prefix_cache=0) as rt, TemporaryDirectory() as folder:
        ids, file, names = rt.encode(language_reference())[:length], Path(folder) / "text", rt.expert_names[:1]
        for _ in range(ROUNDS):
            session, loaded = rt.session(expert=names[0]), rt.session(expert=names[0])
            session.append(ids)
            acts = {"read": partial(session.read, names), "save": partial(session.save, file), "load": partial(loaded.load, file)}
            for name, act in acts.items():
                start = time.perf_counter()
                act()
                seconds[name].append(time.perf_counter() - start)
            assert [session.step().id for _ in range(8)] == [loaded.step().id for _ in range(8)]
        size = file.stat().st_size
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    print(f"{len(ids):,} tokens: read in {medians['read']:.1f} s, saved in {medians['save']:.2f} s, ", end="")
    print(f"loaded in {medians['load']:.2f} s, {size / 1e6:,.0f} MB")


if __name__ == "__main__":
    typer.run(main)
