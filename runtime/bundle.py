"""A bundle on disk: its manifest, where its files are, and whether they are the ones that were exported."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from fusionroute.runtime.errors import BundleError, UnavailableError, one_line
from fusionroute.runtime.files import is_partial
from fusionroute.runtime.machine import cores
from fusionroute.runtime.precisions import fastest_first

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Manifest, Variant

FACTORS = "graphs/factors"  # the folder of experts that share one base
ELSEWHERE = {"portable": "for Optimum's ORTModelForCausalLM"}  # targets that no device of the runtime serves


class Bundle:
    """An opened bundle.

    Opening checks that every file exists with its size and hashes all but weights; `verify()` hashes these too.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Raises BundleError where the bundle is missing, incomplete or was changed."""
        from fusionroute.runtime.manifest import Manifest  # pydantic would double the time of `import runtime`

        path = Path(folder)
        bundle = cls(path, Manifest.read(path))
        for name, file in bundle.manifest.files.items():
            if not (path / name).is_file():
                raise BundleError(f"The bundle {path} lacks {name}; copy or export it again.")
            if (size := (path / name).stat().st_size) != file.bytes:
                raise BundleError(f"{path / name} has {size} bytes where the manifest says {file.bytes}; copy or export the bundle again.")
        for name in bundle.manifest.files:
            # executed or small: always hashed; weights are checked by size only
            if name.endswith((".onnx", ".engine", ".json", ".jinja")):
                bundle.check(name)
        return bundle

    def check(self, name: str) -> None:
        """Compare one file's hash with the manifest. Raises BundleError where they differ."""
        try:
            digest = sha256(self.folder / name)
        except OSError as error:
            raise BundleError(f"{self.folder / name} cannot be read ({error.strerror}); copy or export the bundle again.") from error
        if digest != self.manifest.files[name].sha256:
            raise BundleError(
                f"{self.folder / name} was changed after the export (its SHA-256 differs from the manifest); export the bundle again."
            )

    def text(self, name: str) -> str | None:
        """A text file of the bundle, or None where the bundle has none of that name."""
        if name not in self.manifest.files:
            return None
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{self.folder / name} cannot be read ({one_line(error)}); copy or export the bundle again.") from error

    def verify(self) -> None:
        """Hash every file, and look for files that the manifest does not name.

        What a process was writing when it was killed is passed over, and factors of experts that one was adding or
        removing: the next write of the same file, or change of the experts, removes it.
        Raises BundleError for the first that is wrong.
        """
        from concurrent.futures import ThreadPoolExecutor  # here: most bundles are opened unverified

        with ThreadPoolExecutor(cores()) as pool:  # hashing leaves the interpreter to other threads
            list(pool.map(self.check, self.manifest.files))
        known = set(self.manifest.files) | {"manifest.json"}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name not in known and not is_leftover(path, self.folder):
                raise BundleError(
                    f"{path} does not belong to the bundle (the manifest does not name it); remove it or export the bundle again."
                )

    def variants(self, target: str) -> list[Variant]:
        """The variants for a target such as `ort:cpu`, the fastest first."""
        by_precision = {variant.precision: variant for variant in self.manifest.variants if variant.target == target}
        return [by_precision[name] for name in fastest_first(by_precision, target)]

    def variant(self, target: str, precision: str | None) -> Variant:
        """The variant for a target and a precision, by default the fastest.

        Raises UnavailableError naming what the bundle has.
        """
        by_precision = {variant.precision: variant for variant in self.variants(target)}
        if not by_precision:
            targets = sorted({variant.target for variant in self.manifest.variants})
            known = ", ".join(f"{name} ({ELSEWHERE[name]})" if name in ELSEWHERE else name for name in targets)
            raise UnavailableError(
                f"The bundle {self.folder} has no graphs for {target}, only for {known}: export it with --target {target}."
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


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
