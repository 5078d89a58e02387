"""The wheels that the check needs on another machine, fetched by pip for its Python and processor."""

import subprocess
import sys
from pathlib import Path

from fusionroute.runtime.errors import FusionError

MACHINES = ("x86_64", "aarch64")
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)  # minor versions that wheels name, the newest first: pip takes only equal ones

# The check without torch, CUDA, cuDNN, cuBLAS and cuda-bindings, which the machine has, or the checks that need them skip.
RUNTIME = ("blake3", "filelock", "jinja2", "numpy", "platformdirs", "psutil", "pydantic", "rich", "tokenizers", "typer")
CHECKS = ("onnx", "onnx-ir", "ml-dtypes", "pytest")
ON_GPU = {"x86_64": "onnxruntime-gpu", "aarch64": "onnxruntime"}  # PyPI has no onnxruntime-gpu for aarch64: see the README


def fetch(folder: Path, python: str, machine: str, onnx_runtime: str | None = None) -> list[str]:
    """Fetch wheels into a folder; returns the requirements that they serve.

    `python`: such as 3.12; `onnx_runtime`: a requirement in place of the default. Raises FusionError with pip's last line.
    """
    requirements = [onnx_runtime or ON_GPU[machine], *RUNTIME, *CHECKS]
    glibc = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC]
    older = [f"manylinux2014_{machine}", *([f"manylinux1_{machine}", f"manylinux2010_{machine}"] if machine == "x86_64" else [])]
    platforms = [option for name in (*glibc, *older) for option in ("--platform", name)]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--implementation", "cp",
        "--python-version", python, *platforms, "--dest", str(folder), *requirements,
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["it gives no reason"])[-1]
        raise FusionError(f"pip cannot fetch the wheels for Python {python} on {machine} ({last}): name another --python or --onnxruntime.")
    return requirements
