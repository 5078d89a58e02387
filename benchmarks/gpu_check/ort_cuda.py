"""Bundles on ONNX Runtime's CUDA provider: the CPU's logits, and how fast tokens come. Needs the runtime's packages only."""

from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.gpu_check.outcome import Finding, Skipped
from fusionroute.calibration.prompts import HELD_OUT
from fusionroute.runtime import FusionRuntime, Scores
from fusionroute.runtime.bench.bench import BenchOptions, bench
from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.manifest import Manifest, Variant
from fusionroute.runtime.precisions import PRECISIONS
from fusionroute.runtime.text import Text

TARGET = "ort:cuda"
TOKENS = 512  # read by both
VALUES = 1 << 25  # of logits on the host at most: fewer tokens of a large vocabulary
NEW_TOKENS, REPEATS = 64, 5


def parity(folder: Path, variant: Variant) -> Finding:
    """Teacher-forced logits of a variant against those of fp32 on the CPU, and the same experts."""
    ids, expected = reference(folder)
    try:
        with FusionRuntime.load(folder, variant.precision, "cuda") as runtime:
            scores = runtime.score(ids)
    except UnavailableError as error:
        raise Skipped(str(error)) from error
    p, q = log_softmax(expected.logits), log_softmax(scores.logits)
    figures = {
        "tokens": len(ids),
        "greedy_agreement": float((p.argmax(-1) == q.argmax(-1)).mean()),
        "routing_agreement": float((expected.experts == scores.experts).mean()),
        "kl_mean": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "max_difference": float(np.abs(expected.logits - scores.logits).max()),
        "largest_logit": float(np.abs(expected.logits).max()),
    }
    bounds = PRECISIONS[variant.precision].bounds_for(TARGET)
    missed = [name for name in ("greedy_agreement", "routing_agreement") if figures[name] < bounds.get(name, 0)]
    missed += ["kl_mean"] if figures["kl_mean"] > bounds.get("kl_mean", np.inf) else []
    says = (
        f"top-1 {figures['greedy_agreement']:.1%}, routing {figures['routing_agreement']:.1%}, KL {figures['kl_mean']:.1e}, largest difference "
        f"{figures['max_difference']:.2g} of {figures['largest_logit']:.3g} over {len(ids)} tokens"
    )
    return Finding(not missed, says + (f"; misses its bound: {', '.join(missed)}" if missed else ""), figures)


def speed(folder: Path) -> Finding:
    """Decode and prefill of every precision, and the share of the device's bandwidth that decoding reaches."""
    precisions = tuple(variant.precision for variant in Manifest.read(folder).variants if variant.target == TARGET)
    try:
        figures = bench(folder, BenchOptions(precisions, "cuda", new_tokens=NEW_TOKENS, repeats=REPEATS))
    except UnavailableError as error:
        raise Skipped(str(error)) from error
    return Finding(True, "; ".join(described(row, figures["prompt_tokens"]) for row in figures["rows"]), figures)


def described(row: dict[str, float], prompt: int) -> str:
    """One row of a benchmark for people."""
    share = f", {row['bandwidth_share']:.1%} of the bandwidth" if row.get("bandwidth_share") else ""
    return (
        f"{row['precision']} {row['tokens_per_second']:.1f} tokens/s (p95 {row['p95'] * 1e3:.2f} ms{share}), prefill "
        f"{prompt / row['first_token']:.0f} tokens/s"
    )


@cache
def reference(folder: Path) -> tuple[list[int], Scores]:
    """A held-out text, and the CPU's scores of it in fp32. Raises Skipped where the bundle has no fp32 for the CPU."""
    manifest = Manifest.read(folder)
    if not any((variant.target, variant.precision) == ("ort:cpu", "fp32") for variant in manifest.variants):
        raise Skipped("the bundle has no fp32 for the CPU to be held against: export it with --target ort and --precision fp32,…")
    count = min(TOKENS, manifest.max_seq_len, VALUES // manifest.vocab_size)
    if "tokenizer.json" in manifest.files:
        tokenizer = Text.load(folder / "tokenizer.json")
        ids = [id for text in HELD_OUT for id in tokenizer.encode(text)][:count]
    else:
        ids = [int(id) for id in np.random.default_rng(0).integers(0, manifest.vocab_size, count)]
    with FusionRuntime.load(folder, "fp32", "cpu") as runtime:
        return ids, runtime.score(ids)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row by row, in double precision."""
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    logarithms: np.ndarray = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return logarithms
