"""What the import contracts in pyproject.toml do not say.

No file is long, and no package and its own modules import in a circle.
"""

import json
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.support.paths import REPOSITORY

FOLDERS = ("runtime", "calibration", "fr_export")
MOST_LINES = 300

IMPORTS = """
import json, grimp
graph = grimp.build_graph("fusionroute", cache_dir=None)
print(json.dumps({module: sorted(graph.find_modules_directly_imported_by(module)) for module in graph.modules}))
"""


def test_no_file_is_long() -> None:
    folders = [REPOSITORY / folder for folder in (*FOLDERS, "benchmarks", "examples")]
    files = [*REPOSITORY.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    assert len(files) > 150
    lines = {str(path.relative_to(REPOSITORY)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def imports(folder: Path) -> dict[str, list[str]]:
    """What each module imports, in functions and for type checkers too.

    `folder` is empty: links there lay the package out as a wheel does.
    """
    package = folder / "fusionroute"
    package.mkdir()
    (package / "__init__.py").symlink_to(REPOSITORY / "fusionroute.py")
    for name in FOLDERS:
        (package / name).symlink_to(REPOSITORY / name)
    variables = os.environ | {"PYTHONPATH": str(folder)}
    ended = subprocess.run([sys.executable, "-c", IMPORTS], cwd=folder, env=variables, capture_output=True, text=True, check=True)
    graph: dict[str, list[str]] = json.loads(ended.stdout)
    return graph


def test_no_file_takes_part_in_a_circle(tmp_path: Path) -> None:
    """Packages' own files included, which the contract about siblings leaves out."""
    graph = imports(tmp_path)
    assert "fusionroute.runtime.errors" in graph["fusionroute.runtime.manifest"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from None
