"""The engines of a bundle: built from its graphs, kept in its folder `engines` with an entry in the manifest, and held against the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fusionroute.runtime import limits
from fusionroute.runtime.errors import FusionError, UnavailableError
from fusionroute.runtime.tensorrt.build import Advance, Shapes, build
from fusionroute.runtime.tensorrt.library import NAMES, load
from fusionroute.runtime.tensorrt.operators import number, since

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Engines, Manifest, Profile, Variant

FOLDER = "engines"
TARGET = "tensorrt"  # of the graphs, for either library
OLDER = "tensorrt:10.3"  # of graphs for libraries before 10.15, in operators that all have
FUSION = "fusion"
CANDIDATES = 512
LARGEST = 3840  # of TopK

Begin = Callable[[str], Advance]  # (name of the engine) → who is told of its progress


def target_for(manifest: Manifest, flavour: str, version: str) -> str:
    """Which graphs of a bundle a library builds: those in its newest operators where it has them and the bundle too.

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


def profile_of(manifest: Manifest) -> Profile:
    """What the engines of a bundle are built for: chunks of up to CHUNK tokens, and all of its context."""
    from fusionroute.runtime.manifest import Profile

    chunk = min(limits.CHUNK, manifest.max_seq_len)
    return Profile(
        tokens=chunk,
        keys=manifest.max_seq_len,
        positions=chunk,
        rows=max(1, min(chunk, limits.FUSED // manifest.vocab_size)),
        candidates=min(CANDIDATES, manifest.vocab_size, LARGEST - 1),
        penalised=manifest.max_seq_len,
    )


def shapes(profile: Profile, vocab: int) -> dict[str, Shapes]:
    """Smallest, usual (a decoding step) and largest shape of every free input of the models and of the fusion graph."""
    return {
        "input_ids": ((1, 1), (1, 1), (1, profile.tokens)),
        "key_positions": ((1,), ((profile.keys + 1) // 2,), (profile.keys,)),
        "logit_positions": ((1,), (1,), (profile.positions,)),
        "router_logits": ((1, vocab), (1, vocab), (profile.rows, vocab)),
        "expert_logits": ((1, vocab), (1, vocab), (profile.rows, vocab)),
        "penalty_ids": ((1, 0), (1, 0), (profile.rows, profile.penalised)),
        "k": ((1,), (1,), (profile.candidates,)),
    }


def build_engines(
    folder: Path, manifest: Manifest, variant: Variant, flavour: str, sms: tuple[int, ...], workspace: int | None, begin: Begin
) -> Engines:
    """Build every engine of a variant into the bundle at `folder`; its manifest is left as it is.

    `begin` is called with an engine's name when it is its turn. Raises FusionError subclasses as `build` does; nothing is left behind then.
    """
    from fusionroute.runtime.manifest import Engines

    version = load(flavour).__version__
    profile = profile_of(manifest)
    dimensions = shapes(profile, manifest.vocab_size)
    graphs = variant.graphs | {FUSION: variant.fusion_graph}
    where = "+".join(f"sm{sm}" for sm in sms)
    library = flavour + variant.target.removeprefix(TARGET).replace(":", "-")
    made = {name: f"{FOLDER}/{name}.{library}.{variant.precision}.{where}.engine" for name in graphs}
    (folder / FOLDER).mkdir(exist_ok=True)
    try:
        for name, graph in graphs.items():
            operators = () if name == FUSION else variant.operators
            build(folder / graph, folder / made[name], flavour, dimensions, sms, operators, workspace, begin(name))
    except BaseException:
        for path in made.values():
            (folder / path).unlink(missing_ok=True)
        raise
    return Engines(flavour=flavour, version=version, sms=list(sms), engines=made, profile=profile)


def with_engines(variant: Variant, built: Engines) -> Variant:
    """A variant with new engines in place of those for the same library and GPUs."""
    others = [old for old in variant.engines if (old.flavour, old.sms) != (built.flavour, built.sms)]
    return variant.model_copy(update={"engines": [*others, built]})


def fitting(bundle: Path, variant: Variant, flavour: str, version: str, sm: int | None) -> Engines:
    """The engines of a variant that run on this machine: library, its version and the GPU's compute capability.

    Raises UnavailableError that names what differs and how to rebuild.
    """
    mend = f"rebuild them here with: python -m runtime build {bundle} --precision {variant.precision}"
    mine = [built for built in variant.engines if built.flavour == flavour]
    if not mine:
        raise UnavailableError(f"The bundle {bundle} has no {NAMES[flavour]} engines for {variant.precision}: {mend}.")
    if sm is None:
        raise UnavailableError(f"{NAMES[flavour]} engines need an NVIDIA GPU, and there is none here: use device='cpu'.")
    right = [built for built in mine if sm in built.sms]
    if not right:
        has = ", ".join(dict.fromkeys(f"sm{each}" for built in mine for each in built.sms))
        raise UnavailableError(
            f"The {NAMES[flavour]} engines of {bundle} for {variant.precision} are for {has}, but this machine's GPU is sm{sm}: {mend}."
        )
    found = next((built for built in right if built.version == version), None)
    if found is None:
        raise UnavailableError(
            f"The {NAMES[flavour]} engines of {bundle} for {variant.precision} were built by version {right[0].version}, but this machine has "
            f"{version}: {mend}."
        )
    return found


def rebuild(
    folder: Path, variants: list[Variant], manifest: Manifest, flavour: str, sms: tuple[int, ...], workspace: int | None, begin: Begin
) -> Manifest:
    """Build the engines of some variants of a bundle and write its manifest after each, so that what is done stays.

    Returns the manifest. Engines that new ones replace are removed. Raises FusionError subclasses as `build` does.
    """
    from fusionroute.runtime.bundle import sha256
    from fusionroute.runtime.manifest import File

    for variant in variants:
        try:
            built = build_engines(folder, manifest, variant, flavour, sms, workspace, begin)
            changed = with_engines(variant, built)
            kept = [changed if each is variant else each for each in manifest.variants]
            used = {path for each in kept for engines in each.engines for path in engines.engines.values()}
            files = {name: file for name, file in manifest.files.items() if not name.startswith(f"{FOLDER}/") or name in used}
            for path in built.engines.values():
                files[path] = File(sha256=sha256(folder / path), bytes=(folder / path).stat().st_size)
            gone = manifest.files.keys() - files.keys()
            manifest = manifest.model_copy(update={"variants": kept, "files": files})
            manifest.write(folder)
        except OSError as error:
            raise FusionError(
                f"The engines cannot be written to {folder / FOLDER} ({error.strerror}): copy the bundle to where you may write."
            ) from error
        for path in gone:
            (folder / path).unlink(missing_ok=True)
    return manifest
