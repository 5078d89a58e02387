"""ONNX Runtime writes no device id and no events for a program that loads a bundle, unless its user wants it to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# ONNX Runtime reads the variable when it is imported, and writes from a thread of its own, if and when it likes.
CODE = """
import sys
from fusionroute.runtime import FusionRuntime
assert "onnxruntime" not in sys.modules
import os, time
print(os.environ["ORT_DISABLE_TELEMETRY"])
with FusionRuntime.load(sys.argv[1], "fp32", "cpu", threads=1) as runtime:
    runtime.generate([1, 2], 2)
    time.sleep(0.5)
"""


@pytest.mark.parametrize("asked", [None, "0"])
def test_nothing_is_written_but_the_own_cache(bundles: list[Path], tmp_path: Path, asked: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    environment |= {} if asked is None else {"ORT_DISABLE_TELEMETRY": asked}
    process = subprocess.run([sys.executable, "-c", CODE, bundles[0]], env=environment, check=True, capture_output=True, text=True)
    assert process.stdout == f"{'1' if asked is None else asked}\n"
    others = [path for path in tmp_path.rglob("*") if path.is_file() and "fusionroute" not in path.parts]
    assert asked is not None or not others, others
