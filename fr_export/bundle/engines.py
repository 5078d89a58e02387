"""Build the TensorRT-RTX engines of a bundle that is being exported."""

from pathlib import Path

from fusionroute.fr_export.console.progress import Stages
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.tensorrt.engines import rebuild
from fusionroute.runtime.tensorrt.library import TARGET


def add_engines(manifest: Manifest, gpus: tuple[int, ...], folder: Path, stages: Stages) -> Manifest:
    """Build engines for the compute capabilities `gpus` from every variant that has graphs for them.

    Writes the manifest after each precision and returns the last. Raises FusionError as `runtime.tensorrt.build` does.
    """
    for variant in [each for each in manifest.variants if each.target == TARGET]:
        with stages.stage(f"building {variant.precision} engines", len(variant.engine_graphs)) as advance:
            manifest = rebuild(folder, [variant], manifest, "rtx", gpus, None, lambda _: advance)
    return manifest
