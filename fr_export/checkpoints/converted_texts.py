"""Where texts are kept that were converted from other files of a checkpoint, such as a tokenizer.json."""

import atexit
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fusionroute.runtime import files

VERSION = 1  # of the conversions: raising it lets everything be converted again


def converted_folder(sources: Iterable[Path]) -> Path:
    """`converted/KEY` in the cache folder, where KEY tells path, size and time of the files that texts are made from.

    Where the cache cannot be written: a folder that is removed when the process ends.
    """
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
    key = hashlib.sha256(json.dumps([VERSION, stamps]).encode()).hexdigest()
    folder = files.cache_folder() / "converted" / key[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="fusionroute-converted-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
