"""A system of Gemma-2-2B's shapes with random weights, made on the spot: speed at a size where bandwidth decides."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil

from benchmarks.gpu_check import ort_cuda
from benchmarks.gpu_check.budget import Budget
from benchmarks.gpu_check.facts import open_device
from benchmarks.gpu_check.outcome import Finding, Skipped

DISK, MEMORY, SECONDS = 45e9, 24e9, 600  # what it takes: bytes of disk and of the host's memory, and time
DEVICE_MEMORY = 20e9  # bytes: three models in half precision, and their caches


def random_2b(budget: Budget, out: Path) -> Finding:
    """Export three models in half precision for CUDA, and time them. Raises Skipped where something does not suffice."""
    device, left = open_device(), budget.left()
    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            raise Skipped(f"making the system needs {package}, which is not installed here")
    for have, need, what in (
        (shutil.disk_usage(out).free, DISK, "disk"),
        (psutil.virtual_memory().available, MEMORY, "memory"),
        (device.free_memory(), DEVICE_MEMORY, "device memory"),
    ):
        if have < need:
            raise Skipped(f"it needs {need / 1e9:.0f} GB of {what}, and {have / 1e9:.0f} are free")
    if left is not None and left < SECONDS:
        raise Skipped(f"it takes about {SECONDS / 60:.0f} minutes, and {left / 60:.1f} are left of this run")
    work = out / "real-size"
    command = [sys.executable, "-m", "benchmarks.real_size", str(work), "--precision", "bf16", "--target", "ort:cuda"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=left)
        return ort_cuda.speed(work / "bundle")
    except subprocess.TimeoutExpired as cut:
        raise Skipped("cut off with the time of this run") from cut
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"the export ended with status {error.returncode}: {error.stderr[-300:]}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
