"""The checks of gpu_check.py: each gives one Outcome, and none stops the others."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from fusionroute.calibration.prompts import HELD_OUT
from fusionroute.fr_export.verify.bounds import misses
from fusionroute.fr_export.verify.compare import LONGEST, TOKENS, Score, compare_scores
from fusionroute.fr_export.verify.engine_graph_on_cpu import System as OnOnnxRuntime
from fusionroute.fr_export.verify.torch_reference import Reference
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.bench.bench import BenchOptions, bench
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import FusionError, UnavailableError, one_line
from fusionroute.runtime.manifest import Manifest, Variant
from fusionroute.runtime.tensorrt.device import Device, Stream
from fusionroute.runtime.tensorrt.engines import fitting, rebuild
from fusionroute.runtime.tensorrt.library import NAMES, TARGET, load
from fusionroute.runtime.tensorrt.loading import Context
from fusionroute.runtime.text import Text

ELSEWHERE = (86, 89, 120)  # what TensorRT-RTX builds for where there is no GPU: RTX 30, 40 and 50
NEAR = 0.01  # logits: tokens nearer than that may change places by rounding alone
PROMPTS, NEW_TOKENS = 4, 48  # texts that are generated and held against others, and their length
BENCHED, REPEATS = 64, 7  # of the benchmark
TELLING = 256 << 20  # bytes of engines from which on the device's memory tells how often weights stand in it
ONCE = 1.5  # times the engines' bytes
UNLIMITED = 1 << 50
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Outcome:
    """What a check found: one sentence for people, and the figures it rests on."""

    check: str
    subject: str
    status: str
    says: str
    figures: dict[str, Any] = field(default_factory=dict)


class Skipped(Exception):
    """A check that cannot be made here; the message says why."""


@dataclass(frozen=True)
class Place:
    """A bundle with one library: `gpu` is the compute capability of this machine's GPU, or None."""

    folder: Path
    flavour: str
    gpu: int | None

    def manifest(self) -> Manifest:
        """As it is now: builds change it."""
        return Manifest.read(self.folder)

    def variants(self) -> list[Variant]:
        """Those with graphs for TensorRT that it can build."""
        return [variant for variant in self.manifest().variants if variant.target == TARGET]

    def runtime(self, precision: str, expert_memory: int | None = None) -> FusionRuntime:
        """The bundle loaded on the GPU."""
        return FusionRuntime.load(self.folder, precision, self.flavour, expert_memory=expert_memory)


Check = Callable[[], tuple[bool, str, dict[str, Any]]]


def outcome(check: str, subject: str, make: Check) -> Outcome:
    """Run a check. What it cannot do here is skipped; every other error is a failure."""
    try:
        good, says, figures = make()
        return Outcome(check, subject, PASSED if good else FAILED, says, figures)
    except Skipped as why:
        return Outcome(check, subject, SKIPPED, str(why))
    except Exception as error:
        says = str(error) if isinstance(error, FusionError) else f"{type(error).__name__}: {one_line(error)}"
        return Outcome(check, subject, FAILED, says)


def checks(place: Place) -> Iterator[Outcome]:
    """All checks of one bundle with one library, in an order that lets later ones use what earlier ones built."""
    name, library = place.folder.name, NAMES[place.flavour]
    for variant in place.variants():
        subject = f"{name} {variant.precision}, {library}"
        built = outcome("build", subject, partial(build, place, variant))
        yield built
        if place.gpu is None or built.status != PASSED:
            why = "there is no NVIDIA GPU on this machine" if place.gpu is None else "there are no engines"
            yield Outcome(", ".join(ON_GPU), subject, SKIPPED, why)
            continue
        for check, make in ON_GPU.items():
            yield outcome(check, subject, partial(make, place, variant))
    yield outcome("benchmark", f"{name}, {library}", partial(compare_speeds, place))


# -- without a GPU ----------------------------------------------------------------------------------------------------


def graphs(folder: Path, variant: Variant) -> tuple[bool, str, dict[str, Any]]:
    """The graphs for TensorRT on ONNX Runtime against the CPU backend."""
    manifest = Manifest.read(folder)
    system = OnOnnxRuntime(folder, manifest, variant, FusionRuntime.coefficients(manifest.fusion, manifest.lam))
    return held(folder, variant, system.score)


def on_cpu(folder: Path) -> tuple[bool, str, dict[str, Any]]:
    """INT8 against half precision on the CPU."""
    return speeds(folder, "cpu", "ort:cpu")


def build(place: Place, variant: Variant) -> tuple[bool, str, dict[str, Any]]:
    """Engines for this machine's GPU, or for others where there is none; those in the bundle that fit are kept."""
    library = load(place.flavour)
    if variant.precision == "fp32" and "Attention" in variant.operators:
        raise Skipped("TensorRT has no fused attention in fp32")
    if place.gpu is None and place.flavour == "tensorrt":
        raise Skipped("TensorRT builds for the GPU it runs on, and there is none")
    sms = ELSEWHERE if place.gpu is None else (place.gpu,)
    manifest = place.manifest()
    try:
        built, took = fitting(place.folder, named(manifest, variant), place.flavour, str(library.__version__), sms[0]), 0.0
    except UnavailableError:
        start = time.perf_counter()
        manifest = rebuild(place.folder, [named(manifest, variant)], manifest, place.flavour, sms, None, lambda _: lambda _: None)
        took = time.perf_counter() - start
        built = named(manifest, variant).engines[-1]
    sizes = {name: manifest.files[path].bytes for name, path in built.engines.items()}
    where = ", ".join(f"sm{sm}" for sm in built.sms)
    made = f"built in {took:.1f} s" if took else "already in the bundle"
    return True, f"{len(sizes)} engines for {where}, {sum(sizes.values()) / 1e6:.1f} MB, {made}", {"bytes": sizes, "seconds": took}


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def parity(place: Place, variant: Variant) -> tuple[bool, str, dict[str, Any]]:
    """Teacher forced, in chunks and token by token, against the CPU backend in fp32; the bounds are those of the export."""
    with place.runtime(variant.precision) as runtime:

        def score(ids: Sequence[int], chunk: int) -> tuple[np.ndarray, np.ndarray]:
            found = runtime.score(ids, chunk=chunk)
            return found.logits, found.experts

        return held(place.folder, variant, score)


def tokens(place: Place, variant: Variant) -> tuple[bool, str, dict[str, Any]]:
    """Greedy texts in fp32: those of the CPU backend, but where two tokens are as good as equal."""
    if variant.precision != "fp32":
        raise Skipped("lower precisions choose other tokens now and then: see parity")
    expected = on_cpu_in_fp32(place.folder)
    with place.runtime(variant.precision) as runtime:
        found = [generated(runtime, prompt) for prompt in prompts(place.folder)]
    apart: list[dict[str, Any]] = []
    for prompt, mine, (theirs, leads) in zip(prompts(place.folder), found, expected, strict=True):
        if mine[0] != theirs:
            place_of = next(n for n, (a, b) in enumerate(zip(mine[0], theirs, strict=False)) if a != b)
            apart.append({"prompt": prompt[:8], "token": place_of, "lead": leads[place_of]})
    far = [each for each in apart if each["lead"] > NEAR]
    says = f"{len(found) - len(apart)} of {len(found)} texts of {NEW_TOKENS} tokens are equal"
    says += f"; the largest lead of the CPU's token where one leaves is {max(each['lead'] for each in apart):.2g} logits" if apart else ""
    return not far, says, {"apart": apart}


def replay(place: Place, variant: Variant) -> tuple[bool, str, dict[str, Any]]:
    """Captured graphs give the tokens that the same engines give without them, and are used."""
    launches = [0]
    launch = Stream.launch

    def counted(stream: Stream, graph: Any) -> None:
        launches[0] += 1
        launch(stream, graph)

    with patch.object(Stream, "launch", counted), place.runtime(variant.precision) as runtime:
        captured = [generated(runtime, prompt) for prompt in prompts(place.folder)]
    with patch.object(Context, "capturable", lambda *_: False), place.runtime(variant.precision) as runtime:
        plain = [generated(runtime, prompt) for prompt in prompts(place.folder)]
    equal = sum(a == b for a, b in zip(captured, plain, strict=True))
    says = f"{launches[0]} launches of captured graphs, {equal} of {len(plain)} texts as without them"
    return launches[0] > 0 and equal == len(plain), says, {"launches": launches[0], "equal": equal}


def eviction(place: Place, variant: Variant) -> tuple[bool, str, dict[str, Any]]:
    """Under a budget of one expert the tokens are the same."""
    device, texts = Device(), prompts(place.folder)

    def run(budget: int | None) -> tuple[list[Any], int]:
        free = device.free_memory()
        with place.runtime(variant.precision, budget) as runtime:
            return [generated(runtime, prompt) for prompt in texts], free - device.free_memory()

    try:
        with place.runtime(variant.precision, UNLIMITED) as runtime:
            sizes = {name: sized(model) for name, model in zip(runtime.expert_names, runtime.backend.experts, strict=True)}
    except UnavailableError as error:
        raise Skipped(str(error)) from error
    expected, without = run(None)
    found, taken = run(max(sizes.values()))
    equal = sum(a == b for a, b in zip(expected, found, strict=True))
    used = len({name for _, experts in expected for name in experts})
    says = (
        f"with {max(sizes.values()) / 1e6:.1f} MB for one expert's weights, {equal} of {len(found)} texts from {used} experts are as without a limit, "
        f"in {taken / 1e6:.1f} MB of device memory instead of {without / 1e6:.1f}"
    )
    figures = {"weights": sizes, "device_memory": taken, "device_memory_without": without, "experts_used": used}
    return equal == len(found), says, figures


def memory(place: Place, variant: Variant) -> tuple[bool, str, dict[str, Any]]:
    """Whether the weights of ordinary engines stand in the device's memory once."""
    manifest = place.manifest()
    built = fitting(place.folder, named(manifest, variant), place.flavour, str(load(place.flavour).__version__), place.gpu)
    size = sum(manifest.files[path].bytes for path in built.engines.values())
    device = Device()
    free = device.free_memory()
    with place.runtime(variant.precision):
        taken = free - device.free_memory()
    figures = {"engines": size, "device_memory": taken}
    says = f"loading engines of {size / 1e6:.1f} MB takes {taken / 1e6:.1f} MB of device memory"
    if size < TELLING:
        raise Skipped(f"{says}: too small to tell how often the weights stand there; take a larger system with BUNDLE=…")
    return taken < ONCE * size, f"{says}, {taken / size:.2f} times as much", figures


def compare_speeds(place: Place) -> tuple[bool, str, dict[str, Any]]:
    """INT8 against half precision on the GPU."""
    if place.gpu is None:
        raise Skipped("there is no NVIDIA GPU on this machine")
    return speeds(place.folder, place.flavour, TARGET)


ON_GPU = {"parity": parity, "same tokens": tokens, "graph replay": replay, "eviction": eviction, "weights once": memory}


# -- what they share --------------------------------------------------------------------------------------------------


def prompts(folder: Path) -> list[list[int]]:
    """Token ids to go on from."""
    return pieces(folder, min(24, Manifest.read(folder).max_seq_len - NEW_TOKENS))[:PROMPTS]


@cache
def pieces(folder: Path, length: int) -> list[list[int]]:
    """The held-out texts, packed end to end and cut; seeded random ids for a bundle without a tokenizer."""
    manifest = Manifest.read(folder)
    if "tokenizer.json" in manifest.files:
        text = Text.load(folder / "tokenizer.json")
        ids = [id for each in HELD_OUT for id in text.encode(each)][:TOKENS]
    else:
        ids = [int(id) for id in np.random.default_rng(0).integers(0, manifest.vocab_size, TOKENS)]
    return [ids[start : start + length] for start in range(0, len(ids), length)]


@cache
def references(folder: Path) -> tuple[list[list[int]], list[Reference]]:
    """Texts, and what the CPU backend in fp32 says of each of their positions."""
    texts = pieces(folder, min(LONGEST, Manifest.read(folder).max_seq_len))
    with cpu(folder) as runtime:
        scores = [runtime.score(ids) for ids in texts]
    return texts, [Reference(found.logits, found.routing, found.experts) for found in scores]


def cpu(folder: Path) -> FusionRuntime:
    """The bundle in fp32 on the CPU."""
    try:
        Bundle.open(folder).variant("ort:cpu", "fp32")
    except UnavailableError as error:
        raise Skipped(
            "the bundle has no fp32 for the CPU to be held against: export it with --target ort,tensorrt --precision fp32,…"
        ) from error
    return FusionRuntime.load(folder, "fp32", "cpu")


@cache
def on_cpu_in_fp32(folder: Path) -> list[tuple[list[int], list[float]]]:
    """For each prompt the CPU's greedy tokens, and by how many logits each leads the second best."""
    found = []
    with cpu(folder) as runtime:
        for prompt in prompts(folder):
            chosen, _ = generated(runtime, prompt)
            rows = runtime.score([*prompt, *chosen], range(len(prompt) - 1, len(prompt) + len(chosen) - 1), chunk=1).logits
            top = np.partition(rows, -2, axis=-1)[:, -2:]
            found.append((chosen, [float(value) for value in top[:, 1] - top[:, 0]]))
    return found


def generated(runtime: FusionRuntime, prompt: Sequence[int]) -> tuple[list[int], list[str]]:
    """NEW_TOKENS greedy tokens and their experts, whether or not the text would end before."""
    session = runtime.session()
    session.append(prompt)
    steps = [session.step() for _ in range(NEW_TOKENS)]
    return [token.id for token in steps], [token.expert for token in steps]


def held(folder: Path, variant: Variant, score: Score) -> tuple[bool, str, dict[str, Any]]:
    """A precision for TensorRT against the CPU backend in fp32."""
    texts, expected = references(folder)
    found = compare_scores(score, texts, expected, lambda _: None)
    missed = misses(TARGET, variant.precision, found)
    decode = found["decode"]
    says = (
        f"top-1 {decode['greedy_agreement']:.1%}, routing {decode['routing_agreement']:.1%}, KL {decode['kl_mean']:.1e}, largest difference "
        f"{max(found[how]['max_difference'] for how in ('chunks', 'decode')):.2g} of {found['largest_logit']:.3g} over {found['tokens']} tokens"
    )
    return not missed, says + (f"; misses its bound: {'; '.join(missed)}" if missed else ""), found


def speeds(folder: Path, device: str, target: str) -> tuple[bool, str, dict[str, Any]]:
    """The benchmark, INT8 against half precision."""
    has = [variant.precision for variant in Manifest.read(folder).variants if variant.target == target]
    pair = [name for name in ("int8", "fp16", "bf16") if name in has][:2]
    if len(pair) < 2:
        raise Skipped(f"the bundle has not int8 and a half precision for {target}, only {', '.join(has) or 'nothing'}")
    found = bench(folder, BenchOptions(tuple(pair), device, new_tokens=BENCHED, repeats=REPEATS, rows="fused,router"))
    fused = [row for row in found["rows"] if row["system"] == "fused"]
    says = "; ".join(
        f"{row['precision']} {row['tokens_per_second']:.1f} tokens/s, p95 {row['p95'] * 1e3:.2f} ms, first token {row['first_token'] * 1e3:.1f} ms"
        for row in fused
    )
    ratio = 1 / fused[1]["times_first"]
    return True, f"{says}; {fused[0]['precision']} is {ratio:.2f} times as fast as {fused[1]['precision']}", found


def named(manifest: Manifest, variant: Variant) -> Variant:
    """A variant as it stands in a manifest that was read later."""
    return next(each for each in manifest.variants if (each.target, each.precision) == (variant.target, variant.precision))


def sized(model: Any) -> int:
    """Bytes of an expert's weights on the device."""
    return int(model.weights.size)
