"""INT8 against half precision, on the GPU or on the CPU."""

from pathlib import Path

from benchmarks.gpu_check.outcome import Finding, Skipped
from benchmarks.gpu_check.setup import Setup
from fusionroute.runtime.bench.bench import BenchOptions, bench
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.tensorrt.library import TARGET

NEW_TOKENS, REPEATS = 64, 7


def on_gpu(setup: Setup) -> Finding:
    """Both precisions on the GPU."""
    if setup.gpu is None:
        raise Skipped("there is no NVIDIA GPU on this machine")
    return compare_precisions(setup.folder, setup.flavour, TARGET)


def on_cpu(folder: Path) -> Finding:
    """Both precisions on the CPU."""
    return compare_precisions(folder, "cpu", "ort:cpu")


def compare_precisions(folder: Path, device: str, target: str) -> Finding:
    """The bundle's benchmark, of int8 and of the first half precision it has. Passes whatever the figures are."""
    available = [variant.precision for variant in Manifest.read(folder).variants if variant.target == target]
    pair = [name for name in ("int8", "fp16", "bf16") if name in available][:2]
    if len(pair) < 2:
        raise Skipped(f"the bundle has not int8 and a half precision for {target}, only {', '.join(available) or 'nothing'}")
    figures = bench(folder, BenchOptions(tuple(pair), device, new_tokens=NEW_TOKENS, repeats=REPEATS, rows="fused,router"))
    int8, half = (row for row in figures["rows"] if row["system"] == "fused")
    speeds = "; ".join(
        f"{row['precision']} {row['tokens_per_second']:.1f} tokens/s, p95 {row['p95'] * 1e3:.2f} ms, first token {row['first_token'] * 1e3:.1f} ms"
        for row in (int8, half)
    )
    return Finding(True, f"{speeds}; {int8['precision']} is {1 / half['times_first']:.2f} times as fast as {half['precision']}", figures)
