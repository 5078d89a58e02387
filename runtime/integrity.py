"""The check of a bundle's files when it is loaded: all of them are hashed the first time on a machine, while it loads.

That a file has the manifest's hash is remembered with what tells it from others and from itself before a change. So the
next load only looks at files, until one is another. What is remembered lies in the user's cache folder, with a checksum.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from fusionroute.runtime import cache, files
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.finite_weights import check_finite
from fusionroute.runtime.machine import cores
from fusionroute.runtime.regular_files import Identity
from fusionroute.runtime.tokenizer_trial import try_tokenizer

KIND, TOKENIZER = "verified", "tokenizer.json"
SETTLED = 2 * 10**9  # ns without a change after which another one has another time, on all file systems


@contextmanager
def checked(bundle: Bundle, everything: bool, trusted: bool = False) -> Iterator[Callable[[], None]]:
    """While the block loads a bundle, hash the files that are not remembered, or `everything`, in other threads.

    Yields a function to call before its tokenizer is read: it waits until that was tried in another process, which is
    not done where the bundle is `trusted`. Raises BundleError, at the end, for a file that is not the manifest's, and
    for one that was changed meanwhile; with `everything` also for one that the manifest does not name, and for numbers
    that are not finite.
    """
    if everything:
        bundle.check_unlisted()
    known = {} if everything else remembered(bundle)
    unknown = [name for name in bundle.manifest.files if known.get(name) != bundle.identities[name]]
    if not unknown:
        yield lambda: None
        bundle.unchanged()
        return
    stop = threading.Event()

    pool = ThreadPoolExecutor(cores(), "fusionroute-verify")
    try:
        trial = (
            pool.submit(try_tokenizer, bundle.read(TOKENIZER), bundle.folder / TOKENIZER) if TOKENIZER in unknown and not trusted else None
        )
        checks = [
            pool.submit(bundle.check, name, stop.is_set) for name in sorted(unknown, key=lambda name: -bundle.manifest.files[name].bytes)
        ]
        yield lambda: trial.result() if trial else None
        for each in checks:
            each.result()
        if everything:
            check_finite(bundle)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    bundle.unchanged()
    if not trusted:
        remember(bundle)


def remembered(bundle: Bundle) -> dict[str, Identity]:
    """The files of a bundle that had the manifest's hashes. Raises nothing: what is not known is hashed."""
    try:
        known = cache.read_checked(note(bundle)) or {}
        return {name: Identity(*map(int, fields)) for name, fields in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def remember(bundle: Bundle) -> None:
    """Note that all files of a bundle have the manifest's hashes, but for those that were just changed. Raises nothing."""
    latest = time.time_ns() - SETTLED
    identities = {name: each for name, each in bundle.identities.items() if max(each.modified, each.changed) < latest}
    with suppress(OSError):  # no place to write: hashed again next time
        cache.write_checked(note(bundle), identities)


def note(bundle: Bundle) -> Path:
    """Where it is noted: by the machine, the manifest's content and the folder itself. Raises OSError."""
    status = bundle.folder.stat()
    about = [platform.node(), status.st_dev, status.st_ino, bundle.manifest.model_dump_json()]
    return files.private_folder(KIND) / f"{cache.sha256(about)}.json"
