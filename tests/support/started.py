"""The README's `fusionroute serve` in a process of its own."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import REPOSITORY


class Started(NamedTuple):
    """`url` ends with the port. `key`: what clients must send."""

    url: str
    key: str


@contextmanager
def started(bundle: Path, *options: str, key: str = "secret") -> Iterator[Started]:
    """Serve a bundle at a free port until the end."""
    command = [str(Path(sys.executable).parent / "fusionroute"), "serve", str(bundle), "--port", "0", *options]
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY), "FUSIONROUTE_API_KEY": key}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=variables, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert " is served at http://127.0.0.1:" in line, line + process.stderr.read()
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a pipe that is full would stop the server's log, and it
        yield Started(line.split()[-1].removesuffix("/v1"), key)
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
