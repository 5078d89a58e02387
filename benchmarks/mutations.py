"""Defects put into the code one at a time, and whether the tests notice: `python -m benchmarks.mutations [--each 12] [--seed 0] [MODULE…]`.

Cosmic Ray makes the mutants (another operator, number, comparison, condition, or loop); so many of each module are drawn,
and only tests of its area run, until the first that fails. Works on a copy of the last commit. Prints a line per mutant
that survives, with its diff, and a table. Needs the package cosmic-ray beside those of the tests.
"""

import argparse
import ast
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUNTIME, PRECISION = "tests/runtime/", "tests/fr_export/precision/"
MACHINE = RUNTIME + "test_session_machine.py"
SPECULATION, DRAFTS = RUNTIME + "speculation/", (RUNTIME + "speculation", RUNTIME + "test_sampling.py")
QUANTISERS = tuple(PRECISION + f"test_{name}.py" for name in ("int8", "gptq_sequential", "precision"))
TESTS: dict[str, tuple[str, ...]] = {  # the module's own come first; the others run where these notice nothing
    "runtime/session.py": (RUNTIME + "test_engine.py", RUNTIME + "test_arguments.py", RUNTIME + "test_threads.py", MACHINE),
    "runtime/sampling.py": (RUNTIME + "test_sampling.py", RUNTIME + "test_arguments.py", RUNTIME + "test_engine.py"),
    "runtime/plain_step.py": (RUNTIME + "test_engine.py", RUNTIME + "test_scoring.py", RUNTIME + "test_shared_base.py", MACHINE),
    "runtime/prefix.py": (RUNTIME + "test_prefix.py", MACHINE),
    "runtime/text.py": (RUNTIME + "test_text.py", RUNTIME + "test_stop_strings.py", RUNTIME + "test_endings.py"),
    "runtime/text_stream.py": (RUNTIME + "test_stop_strings.py", RUNTIME + "test_text.py", RUNTIME + "test_endings.py"),
    "runtime/bundle.py": (RUNTIME + "test_bundle.py", "tests/attacks/test_files.py", "tests/attacks/test_graphs.py"),
    "runtime/speculation/rejection.py": (SPECULATION + "test_rejection.py", *DRAFTS),
    "runtime/speculation/lookup.py": (SPECULATION + "test_lookup.py", *DRAFTS),
    "runtime/speculation/draft_planner.py": (SPECULATION + "test_draft_planner.py", *DRAFTS),
    "runtime/speculation/rounds.py": (SPECULATION + "test_speculation.py", MACHINE),
    "runtime/speculation/costs.py": (SPECULATION + "test_costs.py", *DRAFTS),
    "fr_export/precision/rounding.py": (PRECISION + "test_rounding.py", *QUANTISERS),
    "fr_export/precision/blockwise.py": (PRECISION + "test_rounding.py", *QUANTISERS),
    "fr_export/precision/gptq.py": (PRECISION + "test_gptq.py", *QUANTISERS),
    "fr_export/precision/int4.py": (PRECISION + "test_rounding.py", *QUANTISERS),
    "fr_export/precision/int8.py": (PRECISION + "test_int8.py", PRECISION + "test_rounding.py", *QUANTISERS),
    "fr_export/precision/smoothquant.py": (PRECISION + "test_smoothquant.py", *QUANTISERS),
}


def main() -> None:
    """Print what survives, and the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="*", default=[*TESTS], metavar="MODULE", help="such as runtime/sampling.py; default: all")
    parser.add_argument("--each", type=int, default=12, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundles", help="what `python -m tests.support.exporting DIR` has printed; default: exported anew")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        subprocess.run(["git", "clone", "--quiet", "--local", str(ROOT), str(copy)], check=True)
        bundles = given.bundles or exported(copy, Path(folder) / "bundles")
        os.environ |= {"FUSIONROUTE_BUNDLES": bundles, "XDG_CACHE_HOME": str(Path(folder) / "cache"), "OMP_NUM_THREADS": "1"}
        os.chdir(copy)
        table = {module: survived(module, given.each, given.seed) for module in given.modules}
    print(f"\n{'module':40} mutants  killed  survived")
    total: Counter[str] = Counter()
    for module, outcomes in table.items():
        total += outcomes
        print(f"{module:40} {outcomes.total():7}  {outcomes['killed']:6}  {outcomes['survived']:8}")
    print(f"{'together':40} {total.total():7}  {total['killed']:6}  {total['survived']:8}")


def exported(copy: Path, folder: Path) -> str:
    """Bundles for the tests of the runtime, as their variable names them."""
    command = [sys.executable, "-m", "tests.support.exporting", str(folder)]
    return subprocess.run(command, cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout.strip()


def survived(module: str, count: int, seed: int) -> Counter[str]:
    """Try so many mutants of a module; how many were killed and survived."""
    from cosmic_ray.mutating import mutate_and_test  # type: ignore[import-not-found]

    own, others = (
        f"{sys.executable} -m pytest -q -x -p no:cacheprovider --tb=no {' '.join(tests)}"
        for tests in (TESTS[module][:1], TESTS[module][1:])
    )
    start = time.monotonic()
    sound = subprocess.run(own.split(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    if sound.returncode:
        sys.exit(f"the tests of {module} fail without a mutant: {own}")
    limit = 60 + 10 * (time.monotonic() - start)
    outcomes: Counter[str] = Counter()
    for item in drawn(module, count, seed):
        result = mutate_and_test(item.mutations, own, limit)
        if result.test_outcome == "survived" and TESTS[module][1:]:
            result = mutate_and_test(item.mutations, others, 10 * limit)
        outcome = "survived" if result.test_outcome == "survived" else "killed"  # a test that hangs is killed
        outcomes[outcome] += 1
        if outcome == "survived":
            print(f"{module}:{item.mutations[0].start_pos[0]} {item.mutations[0].operator_name}\n{result.diff}", flush=True)
    print(f"{module}: {dict(outcomes)}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return outcomes


def drawn(module: str, count: int, seed: int) -> list[Any]:
    """Some of the mutants of a module that change what it does: none of its annotations or decorators."""
    from cosmic_ray.commands import init  # type: ignore[import-not-found]
    from cosmic_ray.work_db import WorkDB, use_db  # type: ignore[import-not-found]

    quiet = annotations(Path(module).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/mutants.sqlite", WorkDB.Mode.create) as mutants:
        init([Path(module)], mutants, {})
        items = [item for item in mutants.work_items if not any(start <= item.mutations[0].start_pos < end for start, end in quiet)]
        items = [item for item in items if not re.match(r"\s*def |\s*\*, ", line(module, item))]
    items.sort(key=lambda item: (item.mutations[0].start_pos, item.mutations[0].operator_name, item.mutations[0].occurrence))
    return random.Random(f"{seed} {module}").sample(items, min(count, len(items)))


def line(module: str, item: Any) -> str:
    """The line of a mutant."""
    number: int = item.mutations[0].start_pos[0]
    return Path(module).read_text(encoding="utf-8").splitlines()[number - 1]


def annotations(text: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations and decorators begin and end, as lines and columns."""
    nodes: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += [node.returns, *node.decorator_list]
        elif isinstance(node, ast.ClassDef):
            nodes += node.decorator_list
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            nodes.append(node.annotation)
    return [((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)) for node in nodes if node is not None]


if __name__ == "__main__":
    main()
