"""Experts are added to the folder of a bundle whose models share one base, and removed from it. No other file is touched.

New files lie in the folder, under names of their own, before the manifest names them, and files go after it has ceased
to. So a kill leaves the old bundle or the new one, and perhaps files beside it that nobody reads. The next change
removes these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fusionroute.runtime import files
from fusionroute.runtime.adapters.factor_file import write_factors
from fusionroute.runtime.adapters.lora_adapter import LoraAdapter
from fusionroute.runtime.adapters.unadapted import AdapterFactors, Unadapted, read_layout
from fusionroute.runtime.bundle import FACTORS, Bundle
from fusionroute.runtime.errors import BundleError, FusionError, InputError, UnavailableError, one_line
from fusionroute.runtime.file_entry import File
from fusionroute.runtime.manifest import Manifest, Model, Pair, Variant
from fusionroute.runtime.manifest_file import read_manifest

Change = Callable[[Bundle], Manifest]  # writes what a new manifest names, and returns it


@dataclass(frozen=True)
class NewExpert:
    """An adapter in the place of a row of the routing head."""

    name: str
    adapter: LoraAdapter

    def factors(self, bundle: Bundle, pair: Pair) -> AdapterFactors:
        """What the inputs of a graph hold for it. Raises InputError as `AdapterFactors`, BundleError for broken files."""
        assert pair.adapting is not None
        for name in (pair.adapting.unadapted, pair.adapting.layout):
            bundle.check(name)
        with bundle.open_file(pair.adapting.unadapted) as unadapted, bundle.open_file(pair.adapting.layout) as layout:
            return AdapterFactors(read_layout(layout), Unadapted.read(unadapted), self.adapter)


def open_expert(bundle: Bundle, name: str, source: Path) -> NewExpert:
    """An adapter that may become an expert of a bundle.

    Raises UnavailableError for a bundle that takes none, InputError for a name without a row of the routing head, and
    for a folder that holds no adapter with factors and norms alone.
    """
    check_adapting(bundle)
    if name not in bundle.manifest.rows:
        raise InputError(
            f"The routing head has no row for '{name}', only for {', '.join(bundle.manifest.rows)}: name the expert as the row that it "
            "answers for, or train a router with it and export again."
        )
    return NewExpert(name, LoraAdapter.open(source, name))


def add_expert(folder: Path, name: str, source: Path, replace: bool = False, verify_key: Path | None = None) -> Manifest:
    """Make an adapter an expert of the bundle in a folder, in all its precisions. Returns the new manifest.

    Raises InputError for an expert that is there already, unless it may be replaced; as `open_expert` and
    `AdapterFactors` do; and as `changed`.
    """

    def add(bundle: Bundle) -> Manifest:
        manifest = bundle.manifest
        expert = open_expert(bundle, name, source)
        if name in manifest.experts and not replace:
            raise InputError(f"The bundle {folder} has an expert '{name}' already: add --force to replace it.")
        factors = [expert.factors(bundle, pair) for pair in pairs(manifest)]
        variants, entries = [], dict(manifest.files)
        for variant, arrays in zip(manifest.variants, factors, strict=True):
            path, entry = write_factors(folder / FACTORS, name, arrays.entries, arrays.arrays())
            entries[path.relative_to(folder).as_posix()] = entry
            variants.append(with_factors(variant, name, f"{FACTORS}/{path.name}", arrays.bytes))
        models = {model.name: model for model in manifest.models}
        models[name] = manifest.models[0].model_copy(update={"name": name})
        return arranged(manifest, models, variants, entries)

    return changed(folder, add, verify_key)


def remove_expert(folder: Path, name: str, verify_key: Path | None = None) -> Manifest:
    """Remove an expert from the bundle in a folder; its row of the routing head stays, and is not chosen any more.

    Returns the new manifest. Raises InputError for a name that is no expert's and for the only expert, UnavailableError
    where the models do not share one base, and as `changed`.
    """

    def remove(bundle: Bundle) -> Manifest:
        manifest = bundle.manifest
        check_removable(bundle, name, manifest.experts)
        variants = [without_factors(variant, name) for variant in manifest.variants]
        models = {model.name: model for model in manifest.models if model.name != name}
        return arranged(manifest, models, variants, manifest.files)

    return changed(folder, remove, verify_key)


def check_removable(bundle: Bundle, name: str, experts: list[str]) -> None:
    """Raise InputError or UnavailableError where an expert cannot be removed from a bundle, or from one that is loaded."""
    check_adapting(bundle)
    if name not in experts:
        raise InputError(f"There is no expert '{name}' to remove: use one of {', '.join(experts)}.")
    if len(experts) == 1:
        raise InputError(f"'{name}' is the only expert, and a system needs one: add another one before you remove it.")


def check_adapting(bundle: Bundle) -> None:
    """Raise UnavailableError for a bundle whose experts cannot be others."""
    for variant in bundle.manifest.variants:
        if variant.pair is None:
            raise UnavailableError(
                f"The experts of {bundle.folder} stay as they are, since its models do not share one base: export adapters of one base with "
                "--shared-base."
            )
        if variant.pair.adapting is None:
            reason = f"{next(iter(variant.graphs))} stands beside its base" if variant.graphs else "its router is no adapter of a base"
            raise UnavailableError(
                f"The experts of {bundle.folder} stay as they are, since {reason}: export the system again with the experts that it is to have."
            )


def pairs(manifest: Manifest) -> list[Pair]:
    """What the variants say of their graphs for pairs."""
    return [variant.pair for variant in manifest.variants if variant.pair is not None]


def with_factors(variant: Variant, name: str, path: str, size: int) -> Variant:
    """A variant with an expert's factors."""
    assert variant.pair is not None
    pair = variant.pair.model_copy(update={"factors": variant.pair.factors | {name: path}})
    return variant.model_copy(update={"pair": pair, "weight_bytes": variant.weight_bytes | {name: size}})


def without_factors(variant: Variant, name: str) -> Variant:
    """A variant without an expert."""
    assert variant.pair is not None
    factors = {other: path for other, path in variant.pair.factors.items() if other != name}
    read = {other: size for other, size in variant.weight_bytes.items() if other != name}
    return variant.model_copy(update={"pair": variant.pair.model_copy(update={"factors": factors}), "weight_bytes": read})


def arranged(manifest: Manifest, models: Mapping[str, Model], variants: list[Variant], entries: Mapping[str, File]) -> Manifest:
    """The manifest with other experts, in the order of the routing head's rows, and with the files that are still named."""
    rows = manifest.rows
    experts = [models[row] for row in rows if row in models]
    ordered = []
    for variant in variants:
        assert variant.pair is not None
        factors = {model.name: variant.pair.factors[model.name] for model in experts}
        sizes = {model.name: variant.weight_bytes[model.name] for model in (manifest.models[0], *experts)}
        ordered.append(variant.model_copy(update={"pair": variant.pair.model_copy(update={"factors": factors}), "weight_bytes": sizes}))
    named = {path for variant in ordered for path in (variant.pair.factors.values() if variant.pair else ())}
    listed = {path: entries[path] for path in sorted(entries) if not path.startswith(f"{FACTORS}/") or path in named}
    return manifest.model_copy(
        update={
            "models": [manifest.models[0], *experts],
            "variants": ordered,
            "files": listed,
            "routing_rows": [] if len(experts) == len(rows) else rows,
        }
    )


def changed(folder: Path, change: Change, verify_key: Path | None = None) -> Manifest:
    """Let a bundle's manifest be the one that `change` returns, and remove the factors that it does not name.

    `verify_key`: the file of a public key, whose owner must have signed the bundle. The changed one is not signed.
    Changes of one bundle wait for one another. Raises BundleError for a broken bundle and for one that is replaced
    meanwhile, FusionError where the folder cannot be written, what `change` raises. The bundle is then as it was.
    """
    with lock(folder):
        text = read_manifest(folder)
        bundle = Bundle.open(folder, verify_key)
        if verify_key is not None:
            bundle.verify()
        try:
            manifest = change(bundle)
            if read_manifest(folder) != text:
                raise BundleError(f"The bundle {folder} was replaced meanwhile: try again.")
            manifest.write(folder)
        except OSError as error:
            raise FusionError(f"The bundle {folder} cannot be changed ({error.strerror}): copy it to where you may write.") from error
        finally:
            remove_unnamed(folder)
        return manifest


def remove_unnamed(folder: Path) -> None:
    """Remove factors that the manifest does not name. Processes that have mapped them keep them."""
    named = Manifest.read(folder).files
    for path in (folder / FACTORS).glob("*.safetensors"):
        if f"{FACTORS}/{path.name}" not in named:
            path.unlink(missing_ok=True)
    files.remove_abandoned(folder / FACTORS)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Wait until nobody else on this machine changes the bundle. Raises FusionError where that cannot be told."""
    name = f"experts-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()}.lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(files.locked(files.private_folder("locks") / name))
        except OSError as error:
            raise FusionError(
                f"The lock locks/{name} cannot be made ({one_line(error)}): name another cache folder in XDG_CACHE_HOME."
            ) from error
        yield
