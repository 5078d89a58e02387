"""The calibration stands below the exporter: none of its modules needs torch, transformers, onnx or fr_export."""

import subprocess
import sys
from pathlib import Path

import fusionroute.calibration as calibration

SCRIPT = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(f"calibration.{name}")
assert not {"torch", "transformers", "onnx", "onnx_ir", "fr_export"} & set(sys.modules)
"""


def test_no_module_imports_upwards() -> None:
    names = sorted(path.stem for path in Path(calibration.__file__).parent.glob("*.py") if path.stem != "__init__")
    assert {"observe", "table", "blockwise_forward", "__main__"} <= set(names)
    ended = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
