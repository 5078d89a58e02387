"""A whole benchmark: load every precision once, take turns, and put the figures together."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backends import DEVICES, advising, choose, resolved
from fusionroute.runtime.bench import bandwidth
from fusionroute.runtime.bench.memory import PeakMemory
from fusionroute.runtime.bench.precision import LoadedPrecision, size_and_quality
from fusionroute.runtime.bench.prompt import prompt_ids
from fusionroute.runtime.bench.run import Run, generate
from fusionroute.runtime.bench.summary import summarise, weights_read
from fusionroute.runtime.bench.workload import DRAFTS, FUSED, Workload, workloads
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.integrity import checked
from fusionroute.runtime.machine import cores, installed
from fusionroute.runtime.process_memory import release_freed
from fusionroute.runtime.tensorrt.device import Device
from fusionroute.runtime.tokenizer_trial import Trial

Key = TypeVar("Key", bound=Hashable)
Progress = Callable[[str, float], None]  # (what is done now, share of the whole that it added)
PACKAGES = ("fusionroute", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "numpy")
HALF = ("fp16", "bf16")


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. `precisions`: None for all that the bundle has for the device. `rows`: see `workload.workloads`.

    `sequential`: one precision after the other, where they do not fit in memory together. `expert_memory`,
    `verify_key`, `trusted`: as of `FusionRuntime.load`.
    """

    precisions: tuple[str, ...] | None = None
    device: str = "auto"
    prompt: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int = 64
    repeats: int = 5
    rows: str = FUSED
    sequential: bool = False
    expert_memory: int | None = None
    verify_key: Path | None = None
    trusted: bool = False


def bench(folder: Path, options: BenchOptions, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Measure a bundle; returns the object that `--json` prints. Raises FusionError subclasses."""
    bundle = Bundle.open(folder, options.verify_key)
    device = resolved(bundle, options.device)
    with advising(bundle):
        gpu = None if device == "cpu" else Device()
    names = precision_names(bundle, device, options.precisions)
    with checked(bundle, False, None if options.trusted else Trial()) as models_are_loaded:
        models_are_loaded()
        ids = prompt_ids(bundle, options.prompt, options.prompt_tokens)
    manifest = bundle.manifest
    if len(ids) + options.new_tokens > manifest.max_seq_len:
        raise InputError(
            f"{len(ids)} tokens of prompt and {options.new_tokens} new ones do not fit the context of {manifest.max_seq_len}: "
            "ask for fewer, or export with a larger --max-seq-len."
        )
    progress("reading memory", 0)
    ceiling = bandwidth.of_device(gpu) if gpu else bandwidth.of_host()
    precisions: list[LoadedPrecision] = []
    runs: dict[tuple[str, Workload], list[Run]] = {}
    for group in [[name] for name in names] if options.sequential else [names]:
        with ExitStack() as stack:
            units: dict[tuple[str, Workload], Callable[[], Run]] = {}
            for name in group:
                progress(f"loading {name}", 0.2 / len(names))
                precision, new_units = load(bundle, name, device, gpu, ids, options, stack)
                precisions.append(precision)
                units |= new_units
            share = 0.8 * len(group) / len(names) / (len(units) * options.repeats)
            shown = {key: with_progress(key[0], key[1], share, unit, progress) for key, unit in units.items()}
            runs |= take_turns(shown, options.repeats)
            units.clear()
            shown.clear()
    variants = {name: choose(bundle, DEVICES[device][0], name, device) for name in names}
    base = next(iter(runs.values()))
    rows = [
        summarise(name, workload, texts, base, len(ids), weights_read(variants[name]), ceiling.bytes_per_second)
        for (name, workload), texts in runs.items()
    ]
    result: dict[str, Any] = {
        "bundle": str(folder),
        "family": manifest.family,
        "device": device,
        "prompt_tokens": len(ids),
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "interleaved": not options.sequential,
        "machine": {
            "cores": cores(),
            "architecture": platform.machine(),
            "compute_capability": gpu.sm if gpu else None,
            "read_bandwidth": ceiling.bytes_per_second,
            "bandwidth_buffer": ceiling.buffer,
            "last_level_cache": bandwidth.last_level_cache(),
        },
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
        "precisions": [asdict(each) | {"memory": each.memory._asdict()} for each in precisions],
        "rows": [{field.name: getattr(row, field.name) for field in fields(row)} for row in rows],
    }
    return result | {"notes": notes(result)}


def precision_names(bundle: Bundle, device: str, names: Sequence[str] | None) -> list[str]:
    """The precisions to measure: those that were named, or all that the bundle has for the device (of engines: built).

    Raises UnavailableError where the bundle lacks one, or has none for the device.
    """
    targets = DEVICES[device][0]
    if names is None:
        target = choose(bundle, targets, None, device).target
        variants = [variant for variant in bundle.manifest.variants if variant.target == target]
        built = [variant for variant in variants if device in {engines.flavour for engines in variant.engines}]
        return [variant.precision for variant in built or variants]
    return [choose(bundle, targets, name, device).precision for name in dict.fromkeys(names)]


def load(
    bundle: Bundle, name: str, device: str, gpu: Device | None, ids: Sequence[int], options: BenchOptions, stack: ExitStack
) -> tuple[LoadedPrecision, dict[tuple[str, Workload], Callable[[], Run]]]:
    """Load a precision until `stack` is left, and warm it up. Returns its size and a function per workload."""
    free = gpu.free_memory() if gpu else 0
    release_freed()
    with PeakMemory() as memory:
        start = time.perf_counter()
        runtime = stack.enter_context(
            # every text is read from its beginning, however often it was read before
            FusionRuntime.load(
                bundle.folder,
                name,
                device,
                speculation="auto" if DRAFTS in options.rows else "off",
                prefix_cache=0,
                expert_memory=options.expert_memory,
                verify_key=options.verify_key,
                trusted=options.trusted,
            )
        )
        seconds = time.perf_counter() - start
        units = {(name, workload): unit(workload, runtime, ids, options.new_tokens) for workload in workloads(options.rows, runtime)}
        for measure in units.values():
            measure()
    variant = choose(bundle, DEVICES[device][0], name, device)
    size, quality = size_and_quality(bundle, variant, device if gpu else None)
    device_memory = free - gpu.free_memory() if gpu else None
    kv = sum(map(variant.kv_bytes_per_token, bundle.manifest.models))
    return LoadedPrecision(name, variant.bits_per_weight, kv, size, quality, seconds, memory.growth, device_memory), units


def unit(workload: Workload, runtime: FusionRuntime, ids: Sequence[int], count: int) -> Callable[[], Run]:
    """The function that is measured again and again: it generates one text, in the same buffers each time."""
    session = workload.session(runtime)
    backend = runtime.backend
    return lambda: generate(session, ids, count, workload.drafts, models=lambda: backend.model_seconds)


def with_progress(precision: str, workload: Workload, share: float, measure: Callable[[], Run], progress: Progress) -> Callable[[], Run]:
    """A unit that reports its name and its share of the benchmark before it runs."""

    def measured() -> Run:
        progress(f"{precision} {workload.name}", share)
        return measure()

    return measured


def take_turns(units: dict[Key, Callable[[], Run]], repeats: int) -> dict[Key, list[Run]]:
    """Run each unit once per round, A B A B …: what slows the machine for a while slows all of them."""
    runs: dict[Key, list[Run]] = {key: [] for key in units}
    for _ in range(repeats):
        for key, measure in units.items():
            runs[key].append(measure())
    return runs


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know to read the figures right."""
    sentences = []
    names = [each["name"] for each in result["precisions"]]
    if result["device"] == "cpu" and len(names) > 1:
        half = [name for name in names if name in HALF]
        wide = f": {' and '.join(half)} is stored in half precision and computed in fp32 here" if half else ""
        sentences.append(f"This compares precisions on the CPU, not engines on a GPU{wide}.")
    plain = [row for row in result["rows"] if row["acceptance_rate"] is None]
    if any(row["weight_bytes_per_token"] is None for row in plain):
        sentences.append("The bundle does not say how many bytes a token reads: export it again to see the share of the bandwidth.")
    elif result["device"] == "cpu" and (
        small := [row for row in plain if row["weight_bytes_per_token"] < result["machine"]["last_level_cache"]]
    ):
        which = "all rows" if len(small) == len(result["rows"]) else ", ".join(f"{row['precision']} {row['system']}" for row in small)
        sentences.append(
            f"What a token reads fits the processor's last-level cache ({which}): the share of memory's bandwidth means little there."
        )
    if not result["interleaved"]:
        sentences.append(
            "The precisions ran one after the other, not in turns: what slowed the machine for a while may have met only one of them."
        )
    return sentences
