"""A bundle on disk: its manifest, where its files are, and whether they are the ones that were exported."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from fusionroute.runtime import signing
from fusionroute.runtime.digests import TITLES, Digest
from fusionroute.runtime.errors import BundleError, UnavailableError, one_line, reason
from fusionroute.runtime.files import is_partial
from fusionroute.runtime.graph_file import external_files
from fusionroute.runtime.graph_tensors import tensors
from fusionroute.runtime.machine import cores
from fusionroute.runtime.manifest_file import NAME, SIGNATURE, read_manifest, read_signature
from fusionroute.runtime.precisions import fastest_first
from fusionroute.runtime.regular_files import Identity, identity, open_folder, open_regular

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Manifest, Variant

FACTORS = "graphs/factors"  # the folder of experts that share one base
DESCRIPTORS = "/proc/self/fd"  # on Linux, paths that lead to what a process has open
WINDOW = 1 << 28  # bytes of a file that are mapped and hashed together, without the interpreter: others read JSON meanwhile
ELSEWHERE = {"portable": "for Optimum's ORTModelForCausalLM"}  # targets that no device of the runtime serves


class Bundle:
    """An opened bundle.

    Opening checks that every file is there, is a regular one and has its size. Content is hashed when it is read; all
    files together by `verify`, and when a bundle is loaded for the first time: see `integrity`. From opening on every
    file must stay the one that it was.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest
        self.sha256 = ""  # of the manifest, which names that of every other file
        self.identities: dict[str, Identity] = {}  # of all its files, when the bundle was opened

    @classmethod
    def open(cls, folder: str | Path, verify_key: Path | None = None) -> Bundle:
        """With `verify_key`, the file of a public key: its owner must have signed the manifest, and it must name every file.

        Raises BundleError where the bundle is missing, incomplete, or has links or devices for files; as `signing.check`,
        `signing.public_key` and `check_unlisted` do with a key.
        """
        from fusionroute.runtime.manifest import Manifest  # pydantic would double the time of `import runtime`

        path = Path(folder)
        key = None if verify_key is None else signing.public_key(verify_key)
        text = read_manifest(path)
        if key is not None:
            signing.check(text, read_signature(path), key, str(path))
        bundle = cls(path, Manifest.parse(text, str(path / NAME)))
        bundle.sha256 = hashlib.sha256(text).hexdigest()
        for name, entry in bundle.manifest.files.items():
            with bundle.open_file(name) as file:
                opened = identity(file)
            if opened.bytes != entry.bytes:
                raise BundleError(
                    f"{path / name} has {opened.bytes} bytes where the manifest says {entry.bytes}; copy or export the bundle again."
                )
            bundle.identities[name] = opened
        if key is not None:
            bundle.check_unlisted()
        return bundle

    def open_file(self, name: str) -> BinaryIO:
        """Open a file for reading, unbuffered: the one that was there when the bundle was opened. Raises BundleError."""
        try:
            file = open_regular(self.folder, name)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise BundleError(f"The bundle {self.folder} lacks {name}; copy or export it again.") from error
        except OSError as error:
            raise self._unreadable(name, error) from error
        try:
            self._check_unchanged(name, file)
        except BundleError:
            file.close()
            raise
        return file

    def _check_unchanged(self, name: str, file: BinaryIO) -> None:
        if identity(file) != self.identities.get(name, identity(file)):
            raise BundleError(f"{self.folder / name} was changed since the bundle was opened; load the bundle again.")

    def _unreadable(self, name: str, error: Exception) -> BundleError:
        return BundleError(f"{self.folder / name} cannot be read ({reason(error)}); copy or export the bundle again.")

    def unchanged(self) -> None:
        """Raise BundleError where a file is not the one any more that was there when the bundle was opened."""
        for name in self.manifest.files:
            self.open_file(name).close()

    def _digest(self, name: str, every: bool) -> Digest:
        """Of every hash that the manifest has of a file, or of the one that is checked most quickly."""
        names = list(self.manifest.files[name].hashes)
        return Digest(names if every else names[-1:])

    def _check_hashes(self, name: str, digest: Digest) -> None:
        expected = self.manifest.files[name].hashes
        for kind, actual in digest.hexdigests.items():
            if actual != expected[kind]:
                raise BundleError(
                    f"{self.folder / name} was changed after the export (its {TITLES[kind]} differs from the manifest); export the bundle again."
                )

    def check(self, name: str, stopped: Callable[[], bool] = lambda: False, every: bool = True) -> None:
        """Compare a file's hashes with the manifest's, `every` one or the quickest, unless it is `stopped` on the way.

        Raises BundleError where they differ.
        """
        digest, size = self._digest(name, every), self.manifest.files[name].bytes
        with self.open_file(name) as file:
            try:
                for start in range(0, size, WINDOW):
                    with mmap.mmap(file.fileno(), min(WINDOW, size - start), access=mmap.ACCESS_READ, offset=start) as window:
                        digest.update(window)
                    if stopped():
                        return
            except (OSError, ValueError) as error:  # ValueError: the file ends before its window
                raise self._unreadable(name, error) from error
            self._check_unchanged(name, file)
        self._check_hashes(name, digest)

    def read(self, name: str) -> bytes:
        """The content of a file, which has the manifest's hash, the one that is checked most quickly. Raises BundleError."""
        with self.open_file(name) as file:  # whole: engines are large, and pieces would stand in memory beside it
            try:
                content = file.read()
            except OSError as error:
                raise self._unreadable(name, error) from error
        digest = self._digest(name, every=False)
        digest.update(content)
        self._check_hashes(name, digest)
        return content

    def text(self, name: str) -> str | None:
        """A text file of the bundle, or None where the bundle has none of that name. Raises BundleError."""
        if name not in self.manifest.files:
            return None
        try:
            return self.read(name).decode()
        except UnicodeDecodeError as error:
            raise self._unreadable(name, error) from error

    @contextmanager
    def graph(self, name: str) -> Iterator[tuple[bytes, str]]:
        """A graph's content, and the folder that the locations of its weights are relative to.

        In the block, what lies there is the manifest's: at its end weights and their folders must be those that were
        there at its beginning. The folder's path leads to it even where another is given its name.

        Raises BundleError: for a graph that `external_files` refuses, and one that names other files, too.
        """
        content, parent = self.read(name), PurePosixPath(name).parent
        try:
            weights = {str(parent / location) for location in external_files(content)}
        except ValueError as error:
            raise BundleError(f"The graph {self.folder / name} is refused, since {one_line(error)}; export the bundle again.") from error
        if unlisted := sorted(weights - self.manifest.files.keys()):
            raise BundleError(
                f"The graph {self.folder / name} reads {unlisted[0]!r}, which the manifest does not name; export the bundle again."
            )
        try:
            with open_folder(self.folder, str(parent)) as place:
                before = self._folders(weights)
                yield content, f"{DESCRIPTORS}/{place}" if place is not None and Path(DESCRIPTORS).is_dir() else str(self.folder / parent)
                if self._folders(weights) != before:
                    raise BundleError(f"{self.folder / parent} was changed while it was read; load the bundle again.")
        except OSError as error:
            raise self._unreadable(str(parent), error) from error
        for each in (name, *weights):
            self.open_file(each).close()

    def stored_bytes(self, name: str) -> int:
        """Bytes of the weights that a graph names, each once, and of its own constants. Raises BundleError."""
        files, folder = self.manifest.files, PurePosixPath(name).parent
        places: dict[tuple[str, int], int] = {}
        own = 0
        try:
            for tensor in tensors(self.read(name)):
                if tensor.location:
                    file = files[str(folder / tensor.location)]
                    sizes = {each.offset: each.bytes for each in file.tensors}
                    places[tensor.location, tensor.offset] = sizes.get(tensor.offset, file.bytes)
                else:
                    own += len(tensor.data or b"")
        except (ValueError, KeyError) as error:
            raise BundleError(
                f"{self.folder / name} is no graph whose weights are in the bundle ({one_line(error)}); export it again."
            ) from error
        return own + sum(places.values())

    def _folders(self, names: set[str]) -> list[tuple[int, ...]]:
        """What tells the folders of files from others, and from themselves with other entries."""
        statuses = [os.lstat(self.folder / parent) for parent in sorted({PurePosixPath(name).parent for name in names})]
        return [(status.st_dev, status.st_ino, status.st_ctime_ns) for status in statuses]

    def verify(self) -> None:
        """Hash every file, and look for files that the manifest does not name.

        What a process was writing when it was killed is passed over, and factors of experts that one was adding or
        removing: the next write of the same file, or change of the experts, removes it.
        Raises BundleError for the first that is wrong.
        """
        from concurrent.futures import ThreadPoolExecutor  # here: most bundles are opened unverified

        with ThreadPoolExecutor(cores()) as pool:  # hashing leaves the interpreter to other threads
            list(pool.map(self.check, self.manifest.files))
        self.check_unlisted()

    def check_unlisted(self) -> None:
        """Raise BundleError for anything but folders that the manifest does not name: links and devices too."""
        known = set(self.manifest.files) | {NAME, SIGNATURE}
        read_signature(self.folder)
        for folder, folders, names in os.walk(self.folder):
            links = [name for name in folders if (Path(folder) / name).is_symlink()]
            for path in sorted(Path(folder) / name for name in (*names, *links)):
                if path.relative_to(self.folder).as_posix() not in known and not is_leftover(path, self.folder):
                    raise BundleError(
                        f"{path} does not belong to the bundle (the manifest does not name it); remove it or export the bundle again."
                    )

    def variants(self, target: str) -> list[Variant]:
        """The variants for a target such as `ort:cpu`, the fastest first."""
        by_precision = {variant.precision: variant for variant in self.manifest.variants if variant.target == target}
        return [by_precision[name] for name in fastest_first(by_precision, target)]

    def variant(self, target: str, precision: str | None, exported_as: str | None = None) -> Variant:
        """The variant for a target and a precision, by default the fastest. `exported_as`: what --target calls it.

        Raises UnavailableError naming what the bundle has.
        """
        by_precision = {variant.precision: variant for variant in self.variants(target)}
        if not by_precision:
            targets = sorted({variant.target for variant in self.manifest.variants})
            known = ", ".join(f"{name} ({ELSEWHERE[name]})" if name in ELSEWHERE else name for name in targets)
            raise UnavailableError(
                f"The bundle {self.folder} has no graphs for {exported_as or target}, only for {known}: "
                f"export it with --target {exported_as or target}."
            )
        if precision is None:
            precision = next(iter(by_precision))
        if precision not in by_precision:
            raise UnavailableError(
                f"The bundle {self.folder} has no precision '{precision}' for {target}, only {', '.join(by_precision)}: export it with --precision {precision}."
            )
        return by_precision[precision]


def is_leftover(path: Path, folder: Path) -> bool:
    """Whether a file in a bundle's folder that the manifest does not name is what a killed process has left there."""
    return is_partial(path) or (path.parent == folder / FACTORS and path.suffix == ".safetensors")
