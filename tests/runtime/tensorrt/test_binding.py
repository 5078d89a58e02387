"""NVIDIA's own binding under the runtime, without a GPU: tests/cuda on CUDA on the host."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.host_cuda.install import compile_library, compiler
from tests.support.paths import REPOSITORY


def test_the_binding_converts_what_the_runtime_gives_it(tmp_path: Path) -> None:
    if compiler() is None:
        pytest.skip("there is no C compiler here")
    if find_spec("cuda") is None or find_spec("cuda.bindings._internal.runtime") is None:
        pytest.skip("there is no cuda-bindings here whose table of functions can be changed (Linux, 12.9 or newer)")
    library = compile_library(tmp_path)
    plugins = ("no:cacheprovider", "no:xdist", "tests.support.host_cuda.plugin")
    options = [option for plugin in plugins for option in ("-p", plugin)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *options,
        "-rs",
        "tests/cuda",
        "--confcutdir",
        "tests/cuda",
        "--basetemp",
        str(tmp_path / "tests"),
    ]
    environment = os.environ | {"FUSIONROUTE_HOST_CUDA": str(library), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ran = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert re.search(r"^\d+ passed, \d+ deselected in ", ran.stdout, re.MULTILINE), f"some were skipped: {ran.stdout[-2000:]}"
