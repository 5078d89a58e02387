"""What each stage of an export takes: seconds on the reference machine of `machine.py`, and peak anonymous memory.

Fitted to exports of four models of 0.135 billion parameters (SmolLM2) and of three of 2.6 (Gemma-2-2B's shape); the test
of this file has their figures. Seconds are right within the factors `FASTER` to `SLOWER`, memory within `LEAST` to `MOST`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fusionroute.calibration.side_by_side import CACHES
from fusionroute.fr_export.bundle.disk_space import bits_on_disk
from fusionroute.fr_export.bundle.recording import recording_scheme
from fusionroute.fr_export.bundle.targets import TARGETS
from fusionroute.fr_export.checkpoints.weights import SLICE
from fusionroute.fr_export.forecast.work import Work
from fusionroute.fr_export.graphs.dialects import ort
from fusionroute.fr_export.precision import Scheme
from fusionroute.fr_export.precision.concurrency import Concurrency, fit_memory
from fusionroute.fr_export.precision.scheme import Fitting
from fusionroute.fr_export.verify.compare import DECODED
from fusionroute.fr_export.verify.measure import REFERENCE_LIMIT, obstacle
from fusionroute.runtime.precisions import PRECISIONS
from fusionroute.runtime.tensorrt.library import TARGET as TENSORRT

FASTER, SLOWER = 0.5, 2.0  # of the seconds
LEAST, MOST = 0.7, 1.3  # of the memory

LOADED = 480e6  # bytes of torch, transformers, onnx and a trace
PER_SLICE = 16  # bytes per value of the slice that is being rounded: a few copies in fp32
IN_RUNTIME = 1.25  # bytes that ONNX Runtime holds per byte of weights
BLOCKS = 2.0  # copies in fp32 of the largest matrix, or of a decoder block, while a model is walked
LOGITS = 3  # arrays of compared tokens × vocabulary in fp32

TRACING, PER_LAYER = 2.0, 0.7  # seconds per dialect, and per layer of every architecture
FEW = 5  # layers that a trace in the `ort` dialect sees, of which the others are copies
WRITING = 10e-9  # per value
PER_TOKEN_LAYER, PER_TOKEN_VALUE = 0.5e-3, 25e-12  # of a generated token, for every layer and value that it passes
OPERATION = 1 / 200e9  # while torch reads the compared texts: two operations per value and token
COMPARING = 3  # the same in the runtime, which reads short texts
WALKED = 1 / 370e9  # the same while a model is walked, where products may be in bf16
RECORDING = 1.2  # times as long as calibrating
FITTING = 17e-12  # per value and channel of the widest matrix
SPECTRUM, VECTORS = 1e-10, 2e-10  # of a matrix's singular values, and vectors: per value and row or column, whichever are fewer
BUILDING = 10e-9  # per value and GPU
LOADING = 1.6e-9  # per byte of weights, into torch or ONNX Runtime


@dataclass(frozen=True)
class StageForecast:
    """Seconds and peak bytes of anonymous memory of one stage, as expected."""

    name: str
    seconds: float
    memory: float


def stages(
    work: Work, plan: Sequence[tuple[str, Scheme]], calibration: str, gpus: int, compared_tokens: int, slowness: float
) -> list[StageForecast]:
    """The stages of an export in order. `plan` lists the variants, `gpus` counts those that engines are built for."""
    every = [*before_writing(work, plan, calibration), *writing(work, plan, calibration, gpus), *comparing(work, plan, compared_tokens)]
    return [StageForecast(stage.name, stage.seconds * slowness, stage.memory) for stage in every]


def before_writing(work: Work, plan: Sequence[tuple[str, Scheme]], calibration: str) -> Iterator[StageForecast]:
    """Tracing, and what calibration does before weights are fitted."""
    records = fits(plan, calibration) and not calibration.endswith(".safetensors")
    dialects = {TARGETS[target].dialect for target, _ in plan} | ({ort} if fits(plan, calibration) else set())
    layers = sum(min(FEW, work.traced_layers) if dialect is ort else work.traced_layers for dialect in dialects)
    yield StageForecast("tracing", TRACING * len(dialects) + PER_LAYER * layers, LOADED)
    if records:
        scheme = recording_scheme(work.recorded)
        yield StageForecast(f"writing {scheme.name} to record with", WRITING * work.recorded, LOADED + sliced(work))
        yield StageForecast("recording", RECORDING * walking(work), LOADED + in_runtime(work.recorded, scheme.bits) + CACHES)
        yield StageForecast("calibrating", walking(work), LOADED + at_a_time(work) * BLOCKS * 4 * work.largest_tensor)


def writing(work: Work, plan: Sequence[tuple[str, Scheme]], calibration: str, gpus: int) -> Iterator[StageForecast]:
    """What approximations of experts gain by each rank; then each variant, fitted where it can be, and its engines."""
    decomposing = LOADED + BLOCKS * 4 * work.largest_tensor + fit_memory(0, work.widest)
    if work.decomposed:
        yield StageForecast("measuring what experts change", SPECTRUM * work.decomposed + walking(work), decomposing)
    for target, scheme in plan:
        seconds, memory = WRITING * work.written + VECTORS * work.decomposed, LOADED + sliced(work)
        if work.decomposed:
            memory = max(memory, decomposing)
        if fits([(target, scheme)], calibration):
            seconds += FITTING * work.written * work.widest + walking(work)
            memory = max(memory, LOADED + at_a_time(work) * max(BLOCKS * 4 * work.largest_tensor, fit_memory(0, work.widest)))
        yield StageForecast(f"writing {scheme.name} for {target}", seconds, memory)
        if gpus and target == TENSORRT:
            yield StageForecast(f"building {scheme.name} engines", BUILDING * work.values * gpus, memory)


def comparing(work: Work, plan: Sequence[tuple[str, Scheme]], tokens: int) -> Iterator[StageForecast]:
    """The reference, and each variant that this machine can compare; nothing where no tokens are compared."""
    variants = [(target, scheme) for target, scheme in plan if obstacle(target) is None]
    if not variants or not tokens or work.largest_model * 4 > REFERENCE_LIMIT:
        return
    logits = LOGITS * 4 * tokens * work.vocab_size
    seconds = LOADING * 4 * work.values + 2 * OPERATION * tokens * work.values
    yield StageForecast("reference in torch", seconds, LOADED + 4 * work.largest_model + logits)
    per_token = max(PER_TOKEN_LAYER * work.layers, PER_TOKEN_VALUE * work.active_values)
    reading = COMPARING * OPERATION * tokens * work.values + min(tokens, DECODED) * per_token
    for target, scheme in variants:
        bits = max(scheme.bits, PRECISIONS[scheme.name].rank("ort:cpu"))
        memory = LOADED + in_runtime(work.written, bits) + logits
        yield StageForecast(f"comparing {scheme.name} for {target}", LOADING * work.written * bits / 8 + reading, memory)


def fits(plan: Sequence[tuple[str, Scheme]], calibration: str) -> bool:
    """Whether a variant's weights are fitted to what calibration saw."""
    return calibration != "none" and any(isinstance(scheme, Fitting) for _, scheme in plan)


def sliced(work: Work) -> float:
    """Bytes while weights are rounded slice by slice."""
    return float(at_a_time(work) * PER_SLICE * min(work.largest_tensor, SLICE))


def at_a_time(work: Work) -> int:
    """How many models are calibrated, fitted and written at a time."""
    return Concurrency.of(work.models, fit_memory(work.largest_tensor, work.widest)).models


def in_runtime(values: int, bits: float) -> float:
    """Bytes of so many weights in ONNX Runtime."""
    return IN_RUNTIME * values * bits / 8


def walking(work: Work) -> float:
    """Seconds while the recorded texts pass through every model."""
    return 2 * WALKED * work.tokens * work.values


def variant_bits(plan: Sequence[tuple[str, Scheme]], calibration: str) -> dict[tuple[str, str], float]:
    """(target, precision) → bits per weight on the disk."""
    return {(target, scheme.name): bits_on_disk(scheme, calibration != "none") for target, scheme in plan}
