"""Defects put into the code one at a time, and whether the tests notice: `python -m benchmarks.mutations [--each 20] [--seed 0] [AREA…]`.

Cosmic Ray makes the mutants (another operator, number, comparison, condition, or loop); so many of each area are drawn, and
only tests of the area run, the module's own first, until the first that fails. Works on a copy of the last commit. Prints a
line per mutant that survives, with its diff, and a table. Needs the package cosmic-ray beside those of the tests.
"""

import argparse
import ast
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from difflib import unified_diff
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
RUNTIME, PRECISION = "tests/runtime/", "tests/fr_export/precision/"
PACKAGES = ("torch", "transformers", "onnxruntime", "onnx_ir", "tokenizers", "pydantic", "numba", "hypothesis")
MACHINE = RUNTIME + "test_session_machine.py"

ROUNDED = ("carried", "gptq_sequential", "row_int8", "smoothquant", "w8a8")
PLANNED = ("approximation", "kv_scales", "plan_w8a8", "rank_budget", "sensitive")


class Area(NamedTuple):
    """Modules, as patterns of paths, and the tests beside each module's own, `tests/…/test_NAME.py`."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]


AREAS = {
    "session": Area(
        ("runtime/session.py", "runtime/plain_step.py"),
        (*(f"{RUNTIME}test_{name}.py" for name in ("engine", "arguments", "scoring", "shared_base", "threads")), MACHINE),
    ),
    "sampling": Area(("runtime/sampling.py",), tuple(f"{RUNTIME}test_{name}.py" for name in ("candidates", "arguments", "engine"))),
    "prefix": Area(("runtime/prefix.py",), (MACHINE,)),
    "text": Area(
        ("runtime/text*.py",), tuple(f"{RUNTIME}test_{name}.py" for name in ("stop_strings", "text", "endings", "logits_processor"))
    ),
    "speculation": Area(("runtime/speculation/*.py",), (RUNTIME + "speculation", RUNTIME + "test_sampling.py", MACHINE)),
    "bundle": Area(
        ("runtime/bundle.py", "runtime/manifest.py", "runtime/manifest_file.py"),
        (
            *(f"{RUNTIME}test_{name}.py" for name in ("bundle", "manifest", "signing", "graphs_that_do_not_fit")),
            "tests/attacks/test_files.py",
            "tests/attacks/test_graphs.py",
        ),
    ),
    "quantisers": Area(
        tuple(f"fr_export/precision/{name}.py" for name in ("rounding", "blockwise", "gptq", "int4", "int8", "kernels")),
        tuple(f"{PRECISION}test_{name}.py" for name in ("rounding", "gptq", "int8")),
    ),
    "precisions": Area(tuple(f"fr_export/precision/{name}.py" for name in (*ROUNDED, *PLANNED)), ()),
    "calibration": Area(("calibration/*.py",), ("tests/calibration",)),
}


def main() -> None:
    """Print what survives, and the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("areas", nargs="*", default=[*AREAS], metavar="AREA", help=f"some of {', '.join(AREAS)}; default: all")
    parser.add_argument("--each", type=int, default=20, help="mutants of each area")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundles", help="what `python -m tests.support.exporting DIR` has printed; default: exported anew")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        subprocess.run(["git", "clone", "--quiet", "--local", str(ROOT), str(copy)], check=True)
        bundles = given.bundles or exported(copy, Path(folder) / "bundles")
        os.environ |= {"FUSIONROUTE_BUNDLES": bundles, "XDG_CACHE_HOME": str(Path(folder) / "cache"), "OMP_NUM_THREADS": "1"}
        os.chdir(copy)
        sys.path[0] = str(copy)
        for name in PACKAGES:
            with suppress(ImportError):
                import_module(name)
        table = {name: tried(AREAS[name], given.each, given.seed) for name in given.areas}
    print(f"\n{'area':12} mutants   tried  killed  survived")
    for name, outcome in table.items():
        print(f"{name:12} {outcome.mutants:7} {outcome.tried:7}  {outcome.tried - outcome.survived:6}  {outcome.survived:8}")


def exported(copy: Path, folder: Path) -> str:
    """Bundles for the tests of the runtime, as their variable names them."""
    command = [sys.executable, "-m", "tests.support.exporting", str(folder)]
    return subprocess.run(command, cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout.strip()


class Outcome(NamedTuple):
    """How many mutants an area has, how many of them were tried, and how many of those no test noticed."""

    mutants: int
    tried: int
    survived: int


def tried(area: Area, count: int, seed: int) -> Outcome:
    """Try so many mutants of an area."""
    mutants = [(module, item) for module in modules(area) for item in mutants_of(module)]
    start, every = time.monotonic(), dict.fromkeys(path for module in modules(area) for path in tests(module, area))
    if not passes([*every], 3600):
        sys.exit(f"the tests fail without a mutant: {' '.join(every)}")
    limit = 60 + 3 * (time.monotonic() - start)
    survived = 0
    drawn = random.Random(f"{seed} {area.modules}").sample(mutants, min(count, len(mutants)))
    for number, (module, item) in enumerate(drawn, start=1):
        text, start = Path(module).read_text(encoding="utf-8"), time.monotonic()
        mutant = changed(text, item)
        Path(module).write_text(mutant, encoding="utf-8")
        alive = passes(tests(module, area), limit)  # a test that hangs has noticed
        Path(module).write_text(text, encoding="utf-8")
        place = f"{module}:{item.mutations[0].start_pos[0]} {item.mutations[0].operator_name}"
        if alive:
            survived += 1
            print(place, *unified_diff(text.splitlines(), mutant.splitlines(), n=1, lineterm=""), sep="\n", flush=True)
        print(f"{number} of {len(drawn)}: {place}: {'survived' if alive else 'killed'}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    return Outcome(len(mutants), len(drawn), survived)


def changed(text: str, item: Any) -> str:
    """The text of a module with a mutant in it."""
    from cosmic_ray.mutating import mutate_code  # type: ignore[import-not-found]
    from cosmic_ray.plugins import get_operator  # type: ignore[import-not-found]

    for mutation in item.mutations:
        text = mutate_code(text, get_operator(mutation.operator_name)(**mutation.operator_args), mutation.occurrence)
    return text


def passes(paths: list[str], limit: float) -> bool:
    """Whether tests pass within so many seconds, in a fork of this process: it has imported PACKAGES, which takes long."""
    child = os.fork()
    if not child:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--tb=no", *paths])))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def modules(area: Area) -> list[str]:
    """The paths of an area's modules."""
    return sorted({str(path) for pattern in area.modules for path in Path().glob(pattern)})


def tests(module: str, area: Area) -> list[str]:
    """A module's own tests, then the others of its area."""
    own = Path("tests", module).with_name(f"test_{Path(module).name}")
    return [*([str(own)] if own.exists() else []), *(path for path in area.tests if path != str(own))]


def mutants_of(module: str) -> list[Any]:
    """The mutants of a module that change what it does: none of its annotations, decorators and signatures."""
    from cosmic_ray.commands import init  # type: ignore[import-not-found]
    from cosmic_ray.work_db import WorkDB, use_db  # type: ignore[import-not-found]

    quiet = annotations(Path(module).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/mutants.sqlite", WorkDB.Mode.create) as mutants:
        init([Path(module)], mutants, {})
        items = [item for item in mutants.work_items if not any(start <= item.mutations[0].start_pos < end for start, end in quiet)]
        items = [item for item in items if not re.match(r"\s*def |\s*\*, ", line(module, item))]
    return sorted(items, key=lambda item: (item.mutations[0].start_pos, item.mutations[0].operator_name, item.mutations[0].occurrence))


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
