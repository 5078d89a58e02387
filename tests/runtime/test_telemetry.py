"""ONNX Runtime writes no device id and no events for a program that loads a bundle, unless its user wants it to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Telemetry is written by a thread of its own. A process that expects it stays until the file is there.
CODE = """
import sys, time
from pathlib import Path
from fusionroute.runtime import FusionRuntime
with FusionRuntime.load(sys.argv[1], "fp32", "cpu", threads=1) as runtime:
    runtime.generate([1, 2], 2)
    give_up = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < give_up and not any(Path(sys.argv[2]).rglob("onnxruntime.db")):
        time.sleep(0.05)
"""


@pytest.mark.parametrize("asked", [None, "0"])
def test_nothing_is_written_but_the_own_cache(bundles: list[Path], tmp_path: Path, asked: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    environment |= {} if asked is None else {"ORT_DISABLE_TELEMETRY": asked}
    expected = asked is not None and onnxruntime_version() >= (1, 32)
    wait = "30" if expected else "0.5"
    subprocess.run([sys.executable, "-c", CODE, bundles[0], tmp_path, wait], env=environment, check=True)
    others = [path for path in tmp_path.rglob("*") if path.is_file() and "fusionroute" not in path.parts]
    assert asked is not None or not others, others
    if expected:
        assert any(path.name == "onnxruntime.db" for path in others)  # else there is nothing to turn off any more


def onnxruntime_version() -> tuple[int, ...]:
    import onnxruntime

    return tuple(map(int, onnxruntime.__version__.split(".")[:2]))
