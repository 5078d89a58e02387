"""Teacher-forced logits, in chunks and with single tokens at the end, against the CPU backend in fp32.

The bounds are those of the export.
"""

from pathlib import Path

from benchmarks.gpu_check.cpu_reference import references
from benchmarks.gpu_check.outcome import Finding
from benchmarks.gpu_check.setup import Setup
from fusionroute.fr_export.verify.bounds import misses
from fusionroute.fr_export.verify.compare import Score, compare_scores, scorer
from fusionroute.fr_export.verify.engine_graph_on_cpu import EngineSystemOnCpu
from fusionroute.runtime.manifest import Manifest, Variant
from fusionroute.runtime.options import fusion_coefficients
from fusionroute.runtime.tensorrt.library import TARGET


def graphs(folder: Path, variant: Variant) -> Finding:
    """The graphs for TensorRT, run on ONNX Runtime."""
    manifest = Manifest.read(folder)
    system = EngineSystemOnCpu(folder, manifest, variant, fusion_coefficients(manifest.fusion, manifest.lam))
    return against_cpu(folder, variant, system.score)


def parity(setup: Setup, variant: Variant) -> Finding:
    """The engines, run on the GPU."""
    with setup.runtime(variant.precision) as runtime:
        return against_cpu(setup.folder, variant, scorer(runtime))


def against_cpu(folder: Path, variant: Variant, score: Score) -> Finding:
    """Compare one way to compute a variant with the CPU in fp32."""
    texts, expected = references(folder)
    figures = compare_scores(score, texts, expected, lambda _: None)
    missed = misses(TARGET, variant.precision, figures)
    decode = figures["decode"]
    difference = max(figures[part]["max_difference"] for part in ("chunks", "decode"))
    says = (
        f"top-1 {decode['greedy_agreement']:.1%}, routing {decode['routing_agreement']:.1%}, KL {decode['kl_mean']:.1e}, "
        f"largest difference {difference:.2g} of {figures['largest_logit']:.3g} over {figures['tokens']} tokens"
    )
    return Finding(not missed, says + (f"; misses its bound: {'; '.join(missed)}" if missed else ""), figures)
