"""A bundle's engines: built from its graphs into its folder `engines`, listed in its manifest, chosen for a machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.digests import digest_of
from fusionroute.runtime.errors import BundleError, FusionError, UnavailableError
from fusionroute.runtime.file_entry import File
from fusionroute.runtime.files import replacing
from fusionroute.runtime.manifest import FUSION, Engines, Manifest, Variant
from fusionroute.runtime.manifest_file import NAME
from fusionroute.runtime.tensorrt.build import Advance, build, build_lock
from fusionroute.runtime.tensorrt.library import NAMES, OLDER, TARGET, load
from fusionroute.runtime.tensorrt.operators import number, since
from fusionroute.runtime.tensorrt.profile import profile_of, shapes

FOLDER = "engines"

Begin = Callable[[str], Advance]  # called with an engine's name; returns the function that takes its progress


def target_for(manifest: Manifest, flavour: str, version: str) -> str:
    """The target whose graphs a library builds: TARGET where the library has its operators and the bundle its graphs,
    else OLDER.

    Raises UnavailableError where the bundle has graphs for newer libraries only.
    """
    has = {variant.target for variant in manifest.variants}
    needed = max((since(name) or "0" for name in ("TensorScatter", "RMSNormalization")), key=number)
    if flavour == "rtx" or number(version) >= number(needed):
        return OLDER if OLDER in has and TARGET not in has else TARGET
    if OLDER not in has and TARGET in has:
        raise UnavailableError(
            f"The bundle's graphs for TensorRT need {needed} or newer, and this machine has {version}: export it with --target {OLDER}."
        )
    return OLDER


def build_engines(
    folder: Path, manifest: Manifest, variant: Variant, flavour: str, sms: tuple[int, ...], workspace: int | None, begin: Begin
) -> Engines:
    """Build every engine of a variant into the bundle at `folder`; its manifest is left as it is.

    `begin` is called with an engine's name before it is built. Raises BundleError for a graph that is not the manifest's,
    FusionError subclasses as `build` does, and OSError; the bundle is then as it was: engines appear, in place of older ones, when the last of them is built.
    """
    version = load(flavour).__version__
    profile = profile_of(manifest)
    dimensions = shapes(profile, manifest.vocab_size)
    bundle, graphs = Bundle(folder, manifest), variant.engine_graphs
    gpus = "+".join(f"sm{sm}" for sm in sms)
    library = flavour + variant.target.removeprefix(TARGET).replace(":", "-")
    paths = {name: f"{FOLDER}/{name}.{library}.{variant.precision}.{gpus}.engine" for name in graphs}
    (folder / FOLDER).mkdir(exist_ok=True)
    for abandoned in (folder / FOLDER).glob(".*.partial"):  # left by a build that was killed
        abandoned.unlink()
    with ExitStack() as stack:
        partial = {name: stack.enter_context(replacing(folder / path)) for name, path in paths.items()}
        for name, graph in graphs.items():
            operators = () if name == FUSION else variant.operators
            with bundle.graph(graph) as (content, weights):
                build(Path(weights, Path(graph).name), content, partial[name], flavour, dimensions, sms, operators, workspace, begin(name))
    return Engines(flavour=flavour, version=version, sms=list(sms), engines=paths, profile=profile)


def with_engines(variant: Variant, built: Engines) -> Variant:
    """A variant with new engines in place of those for the same library and GPUs."""
    others = [old for old in variant.engines if (old.flavour, old.sms) != (built.flavour, built.sms)]
    return variant.model_copy(update={"engines": [*others, built]})


def fitting(bundle: Path, variant: Variant, flavour: str, version: str, sm: int | None) -> Engines:
    """The engines of a variant that run on this machine: library, its version and the GPU's compute capability.

    Raises UnavailableError that names what differs and how to rebuild.
    """
    mend = f"rebuild them here with: fusionroute build {bundle} --precision {variant.precision}"
    of_flavour = [built for built in variant.engines if built.flavour == flavour]
    if not of_flavour:
        raise UnavailableError(f"The bundle {bundle} has no {NAMES[flavour]} engines for {variant.precision}: {mend}.")
    if sm is None:
        raise UnavailableError(f"{NAMES[flavour]} engines need an NVIDIA GPU, and there is none here: use device='cpu'.")
    for_gpu = [built for built in of_flavour if sm in built.sms]
    if not for_gpu:
        has = ", ".join(dict.fromkeys(f"sm{each}" for built in of_flavour for each in built.sms))
        raise UnavailableError(
            f"The {NAMES[flavour]} engines of {bundle} for {variant.precision} are for {has}, but this machine's GPU is sm{sm}: {mend}."
        )
    engines = next((built for built in for_gpu if built.version == version), None)
    if engines is None:
        raise UnavailableError(
            f"The {NAMES[flavour]} engines of {bundle} for {variant.precision} were built by version {for_gpu[0].version}, but this machine has "
            f"{version}: {mend}."
        )
    return engines


def rebuild(
    folder: Path, variants: list[Variant], manifest: Manifest, flavour: str, sms: tuple[int, ...], workspace: int | None, begin: Begin
) -> Manifest:
    """Build the engines of some variants of a bundle and write its manifest after each, so that what is done stays.

    Builds of one bundle wait for one another, and each adds to the manifest that the one before has written; `manifest`
    is used where the folder has none yet. Returns the new manifest. Engines that new ones replace are removed. Raises
    FusionError subclasses as `build` does.
    """
    lock = f"locks/{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()}.lock"
    for variant in variants:
        with build_lock(lock):
            try:
                manifest = add_engines(folder, variant, current_manifest(folder, manifest), flavour, sms, workspace, begin)
            except OSError as error:
                raise FusionError(
                    f"The engines cannot be written to {folder / FOLDER} ({error.strerror}): copy the bundle to where you may write."
                ) from error
    return manifest


def current_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest that a bundle has now, or `manifest` where none is written yet.

    Raises BundleError as `Manifest.read` does.
    """
    return Manifest.read(folder) if (folder / NAME).exists() else manifest


def add_engines(
    folder: Path, variant: Variant, manifest: Manifest, flavour: str, sms: tuple[int, ...], workspace: int | None, begin: Begin
) -> Manifest:
    """Build one variant's engines and write the manifest with them; see `rebuild`. Raises OSError too."""
    name = (variant.target, variant.precision)
    current = next((each for each in manifest.variants if (each.target, each.precision) == name), None)
    if current is None:
        raise BundleError(f"The bundle {folder} was replaced by one without {variant.precision} for {variant.target}: build again.")
    built = build_engines(folder, manifest, current, flavour, sms, workspace, begin)
    variants = [with_engines(each, built) if each is current else each for each in manifest.variants]
    used = {path for each in variants for engines in each.engines for path in engines.engines.values()}
    files = {path: file for path, file in manifest.files.items() if not path.startswith(f"{FOLDER}/") or path in used}
    for path in built.engines.values():
        files[path] = File.of(digest_of(folder / path))
    new = manifest.model_copy(update={"variants": variants, "files": files})
    new.write(folder)
    for path in manifest.files.keys() - files.keys():
        (folder / path).unlink(missing_ok=True)
    return new
