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
from fusionroute.runtime.regular_files import Identity, open_regular
from fusionroute.runtime.tokenizer_trial import Trial

KIND, TOKENIZER = "verified", "tokenizer.json"
SETTLED = 2 * 10**9  # ns without a change after which another one has another time, on all file systems


@contextmanager
def begun_trial(folder: Path, everything: bool, trusted: bool) -> Iterator[Trial | None]:
    """A trial of a bundle's tokenizer, for `checked`; None where the bundle is `trusted`.

    Its process runs while this one imports what it needs, so it starts here where it is likely to be needed: for
    `everything`, and where nothing is remembered of the folder.
    """
    if trusted:
        yield None
        return
    trial = Trial()
    try:
        if everything or not is_known(folder):
            with suppress(OSError), open_regular(folder, TOKENIZER) as file:  # opening the bundle tells
                trial.begin(file)
        yield trial
    finally:
        trial.end()


@contextmanager
def checked(bundle: Bundle, everything: bool, trial: Trial | None) -> Iterator[Callable[[], None]]:
    """While the block loads a bundle, hash the files that are not remembered, or `everything`, in other threads.

    Yields a function to call when the models are loaded, before the tokenizer is read: it waits for the `trial`, which is
    None for a bundle that is trusted. Hashing takes the cores that loading leaves: until then those beyond one for each
    model, from then on all but one, and at the end all.

    Raises BundleError, at the end, for a file that is not the manifest's, and for one that was changed meanwhile; with
    `everything` also for one that the manifest does not name, and for numbers that are not finite.
    """
    if everything:
        bundle.check_unlisted()
    known = {} if everything else remembered(bundle)
    unknown = [name for name in bundle.manifest.files if known.get(name) != bundle.identities[name]]
    if not unknown:
        yield lambda: None
        bundle.unchanged()
        return
    names = iter(sorted(unknown, key=lambda name: -bundle.manifest.files[name].bytes))
    stop, pool = threading.Event(), ThreadPoolExecutor(max(cores() - 1, 1), "fusionroute-verify")

    def hash_files() -> None:
        for name in names:  # threads take from the same iterator
            bundle.check(name, stop.is_set, everything)

    def models_are_loaded() -> None:
        checks.extend(pool.submit(hash_files) for _ in range(max(cores() - 1 - spare, 1)))
        if TOKENIZER in unknown and trial is not None:
            trial.decide(bundle.read(TOKENIZER), bundle.folder / TOKENIZER, bundle.identities[TOKENIZER])

    try:
        spare = max(cores() - len(bundle.manifest.models), 0)
        checks = [pool.submit(hash_files) for _ in range(spare)]
        yield models_are_loaded
        hash_files()
        for each in checks:
            each.result()
        if everything:
            check_finite(bundle)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    bundle.unchanged()
    if trial is not None:
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
    """Where it is noted: by the machine, the folder itself and the manifest's content. Raises OSError."""
    about = [platform.node(), bundle.manifest.model_dump_json()]
    return files.private_folder(KIND) / f"{place(bundle.folder)}-{cache.sha256(about)}.json"


def is_known(folder: Path) -> bool:
    """Whether something is noted of a folder. Raises nothing: there may be none."""
    try:
        return any((files.cache_folder() / KIND).glob(f"{place(folder)}-*.json"))
    except OSError:
        return False


def place(folder: Path) -> str:
    """What tells a folder from others. Raises OSError."""
    status = folder.stat()
    return f"{status.st_dev:x}-{status.st_ino:x}"
