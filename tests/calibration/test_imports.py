"""The calibration stands below the exporter: none of its modules needs torch, transformers, onnx or fr_export."""

import subprocess
import sys
from pathlib import Path

from fusionroute import calibration

FOLDER = Path(calibration.__file__).parent
SCRIPT = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(f"fusionroute.calibration.{name}")
packages = {".".join(name.split(".")[:2]) if name.startswith("fusionroute.") else name.split(".")[0] for name in sys.modules}
assert not {"torch", "transformers", "onnx", "onnx_ir", "fusionroute.fr_export"} & packages
"""


def test_no_module_imports_upwards() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
    assert {"observe", "table", "blockwise_forward", "commands", "__main__"} <= set(names)
    ended = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, cwd=FOLDER.parent)
    assert ended.returncode == 0, ended.stderr


IN_A_WHEEL = """
import sys
sys.path.insert(0, sys.argv[1])
from fusionroute.calibration.prompts import BUILTIN
assert BUILTIN and "calibration" not in sys.modules
"""


def test_the_builtin_prompts_lie_in_the_wheel(tmp_path: Path) -> None:
    """There is no top-level package `calibration` in a wheel, which lays all folders below `fusionroute`."""
    package = tmp_path / "fusionroute"
    package.mkdir()
    for folder in ("runtime", "calibration"):
        (package / folder).symlink_to(FOLDER.parent / folder)
    (package / "__init__.py").symlink_to(FOLDER.parent / "fusionroute.py")
    ended = subprocess.run([sys.executable, "-c", IN_A_WHEEL, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
