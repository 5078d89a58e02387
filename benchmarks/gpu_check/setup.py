"""A bundle together with the library that runs it on the GPU."""

from dataclasses import dataclass
from pathlib import Path

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.manifest import Engines, Manifest, Variant
from fusionroute.runtime.tensorrt.engines import fitting
from fusionroute.runtime.tensorrt.library import TARGET, load


@dataclass(frozen=True)
class Setup:
    """A bundle, a library (`flavour`: tensorrt or rtx) and the GPU's compute capability (89 is 8.9; None: no GPU)."""

    folder: Path
    flavour: str
    gpu: int | None

    def manifest(self) -> Manifest:
        """The manifest as it is on disk now: builds change it."""
        return Manifest.read(self.folder)

    def variants(self) -> list[Variant]:
        """The variants whose graphs TensorRT can build."""
        return [variant for variant in self.manifest().variants if variant.target == TARGET]

    def runtime(self, precision: str, expert_memory: int | None = None) -> FusionRuntime:
        """Load the bundle on the GPU; `expert_memory` limits the bytes of experts' weights on the device."""
        return FusionRuntime.load(self.folder, precision, self.flavour, expert_memory=expert_memory)

    def engines(self, variant: Variant, sm: int | None) -> Engines:
        """The bundle's engines that run on compute capability `sm`. Raises UnavailableError where there are none."""
        version = str(load(self.flavour).__version__)
        return fitting(self.folder, same_variant(self.manifest(), variant), self.flavour, version, sm)


def same_variant(manifest: Manifest, variant: Variant) -> Variant:
    """A variant as a newer manifest has it."""
    return next(other for other in manifest.variants if (other.target, other.precision) == (variant.target, variant.precision))
