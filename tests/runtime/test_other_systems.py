"""The light runtime without what only Linux has.

Windows and macOS are simulated: what they lack is taken away before the first import.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusionroute.runtime import FusionRuntime

WITHOUT = """
import json, mmap, os, sys
for module in ("fcntl", "pwd", "grp"):
    sys.modules[module] = None
for owner, names in ((os, ("sched_getaffinity", "register_at_fork", "fork")), (mmap, ("MADV_NOHUGEPAGE", "MAP_PRIVATE", "MAP_ANONYMOUS"))):
    for name in names:
        delattr(owner, name)
mmap.mmap = None
"""
PROGRAM = """
from fusionroute import FusionRuntime
from fusionroute.runtime.files import locked, cache_folder
from fusionroute.runtime.machine import cores
from fusionroute.runtime.bench.memory import available
from fusionroute.runtime.process_memory import resident
with FusionRuntime.load(sys.argv[1], share_weights=sys.argv[2] == "shared", speculation="auto") as rt:
    ids = rt.generate([5, 6, 7], 6).token_ids
with locked(cache_folder() / "lock"):
    print(json.dumps({"ids": ids, "cores": cores(), "resident": list(resident()), "available": available()}))
"""


@pytest.mark.parametrize("weights", ["private", "shared"])
def test_the_runtime_needs_nothing_that_only_linux_has(bundles: list[Path], weights: str) -> None:
    with FusionRuntime.load(bundles[0]) as rt:
        expected = rt.generate([5, 6, 7], 6).token_ids
    run = subprocess.run([sys.executable, "-c", WITHOUT + PROGRAM, bundles[0], weights], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["ids"] == expected
    assert result["cores"] >= 1 and result["resident"][0] > 1 << 20 and result["available"] > 1 << 20
