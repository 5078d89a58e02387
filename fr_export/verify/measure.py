"""Compare every variant of a bundle that this machine can run with plain torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusionroute.fr_export.bundle.targets import TARGETS
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.verify.compare import DECODED, TOKENS, compare, compare_scores, sequences
from fusionroute.fr_export.verify.engine_graph_on_cpu import EngineSystemOnCpu, opset_obstacle
from fusionroute.fr_export.verify.torch_reference import reference
from fusionroute.runtime.backends.ort_cpu import TARGET as CPU
from fusionroute.runtime.bundle import ELSEWHERE
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.options import fusion_coefficients
from fusionroute.runtime.tensorrt.library import OLDER
from fusionroute.runtime.tensorrt.library import TARGET as TENSORRT

REFERENCE_LIMIT = 1 << 30  # bytes in fp32: larger models are not loaded into torch, and not compared


class ComparedVariants(NamedTuple):
    """(target, precision) → the figures of `compare_scores`; where nothing at all could be compared, the reason."""

    figures: dict[tuple[str, str], dict[str, Any]]
    reason: str | None


def measure(
    system: System, manifest: Manifest, prompts: Sequence[str], folder: Path, stages: Stages, tokens: int = TOKENS
) -> ComparedVariants:
    """Compare every variant that this machine can run with torch in fp32, on `tokens` tokens of the texts of `prompts`.

    Without tokens nothing is compared. Writes the manifest into the folder, since the runtime that compares reads the
    bundle as users will.
    """
    if not tokens:
        return ComparedVariants({}, "--compare none")
    variants = [variant for variant in manifest.variants if obstacle(variant.target) is None]
    if not variants:
        return ComparedVariants({}, None)
    largest = max(model.parameters for model in manifest.models) * 4
    if largest > REFERENCE_LIMIT:
        reason = f"a model takes {largest / 1e9:.1f} GB in fp32, more than the {REFERENCE_LIMIT / 1e9:.1f} GB that the comparison loads"
        return ComparedVariants({}, reason)
    manifest.write(folder)
    texts = sequences(system, prompts, tokens)
    coefficients = fusion_coefficients(manifest.fusion, manifest.lam)
    with stages.stage("reference in torch", len(system.models)) as advance:
        references = reference(system, texts, coefficients, advance)
    several_targets = len({variant.target for variant in variants}) > 1
    figures = {}
    for variant in variants:
        label = f"{variant.precision} for {variant.target}" if several_targets else variant.precision
        with stages.stage(f"comparing {label}", DECODED + sum(map(len, texts))) as advance:
            if variant.target in (TENSORRT, OLDER):
                engines = EngineSystemOnCpu(folder, manifest, variant, coefficients)
                compared = compare_scores(engines.score, texts, references, advance)
            else:
                compared = compare(str(folder), variant.precision, texts, references, advance)
        figures[variant.target, variant.precision] = compared
    return ComparedVariants(figures, None)


def obstacle(target: str) -> str | None:
    """Why this machine cannot compare variants for a target, or None. Graphs for TensorRT are run by ONNX Runtime."""
    if target == CPU:
        return None
    if target in (TENSORRT, OLDER):
        return opset_obstacle(TARGETS[target].dialect.OPSET)
    if target in ELSEWHERE:
        return f"graphs for {target} are {ELSEWHERE[target]}, which reads one model and does not route"
    return f"graphs for {target} need a GPU, and this comparison runs on the CPU"
