"""What is planned: the models of a system with the bytes of each, in every precision that a target has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

from fusionroute.runtime.backends.ort_cpu import TARGET as CPU
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.limits import CHUNK
from fusionroute.runtime.manifest import Manifest, Model, Variant
from fusionroute.runtime.plan.shapes import Shape, shapes
from fusionroute.runtime.plan.weights import HALF, Weights, factors_of, format_of, weights_of
from fusionroute.runtime.precisions import PRECISIONS, exported_for, fastest_first

MOST_EXPERTS = 64
ALIVE = 6  # activations of a token that lie in memory at once, each as wide as the widest
PROCESS = {True: 250 << 20, False: 700 << 20}  # an interpreter with its libraries; a GPU has CUDA's context too
ANSWERS = 512  # rows of logits that an engine has room for


@dataclass(frozen=True)
class System:
    """A system in one precision: the router, then the experts.

    weights: of each model; of an expert that shares the router's weights, what it adds. layers: of each. kv_values: per
    token of the text, of each. `shared`: experts read in the router's pass.
    """

    precision: str
    bits: float
    names: tuple[str, ...]
    weights: tuple[Weights, ...]
    layers: tuple[int, ...]
    kv_values: tuple[int, ...]
    kv_bits: int
    vocab: int
    shared: bool

    @property
    def weight_bytes(self) -> int:
        """Of all models."""
        return sum(each.resident for each in self.weights)

    @property
    def expert_bytes(self) -> int:
        """Of the largest expert; 0 without any."""
        return max((each.resident for each in self.weights[1:]), default=0)

    def kv_bytes(self, tokens: int) -> int:
        """Keys and values of all models for a text."""
        return sum(self.kv_values) * self.kv_bits * tokens // 8

    def scratch_bytes(self, target: str) -> int:
        """Of one pass over a prompt, and of the process: an estimate from the width of the router's layers."""
        widest = sqrt(self.weights[0].values / self.layers[0])
        rows = self.vocab * (2 * 4 if target == CPU else ANSWERS * 2)
        return int(PROCESS[target == CPU] + CHUNK * ALIVE * widest * 4 + rows)


@dataclass(frozen=True)
class Request:
    """What was asked for. `build`: makes the system in a precision for a target; `precisions`: that it has there;
    `targets`: that a bundle has graphs for, empty for what is not exported yet.
    """

    family: str
    title: str
    experts: tuple[str, ...]
    context: int
    most_context: int
    shared: bool
    rank: int
    targets: frozenset[str]
    precisions: Callable[[str], Sequence[str]]
    build: Callable[[str, str], System]


def of_shape(shape: Shape, experts: int, context: int, shared: bool, rank: int) -> Request:
    """A router and experts of one shape. Raises InputError for counts that make no system."""
    if not 0 <= experts <= MOST_EXPERTS:
        raise InputError(f"{experts} experts make no system: plan 0, which is one model alone, to {MOST_EXPERTS}.")
    if shared and not experts:
        raise InputError("One model alone shares its base with nothing: leave --shared-base out, or plan --experts.")
    if not 1 <= rank <= shape.hidden:
        raise InputError(f"A rank of {rank} does not fit matrices of {shape.hidden} rows: give --rank 1 to {shape.hidden}.")
    names = tuple(f"expert{number}" for number in range(1, experts + 1))
    models = "one model" if not experts else f"router and {experts} expert{'s' if experts > 1 else ''}"
    base = f", one base with factors of rank {rank}" if shared else ""

    def build(target: str, precision: str) -> System:
        return with_shapes([shape] * (experts + 1), ("router", *names), target, precision, rank if shared else 0)

    return Request(
        shape.family, f"{models} of {shape.name} ({shape.parameters:,} parameters){base}", names, context, shape.context, shared,
        rank, frozenset(), precisions_of, build,
    )  # fmt: skip


def of_bundle(bundle: Bundle, context: int | None) -> Request:
    """An exported system. Raises InputError where the context is beyond what it was exported for."""
    manifest = bundle.manifest
    shared = any(variant.pair is not None for variant in manifest.variants)

    def precisions(target: str) -> list[str]:
        own = [variant.precision for variant in manifest.variants if variant.target == target]
        return own or (precisions_of(target) if known_shapes(manifest) and not shared else [])

    def build(target: str, precision: str) -> System:
        for variant in manifest.variants:
            if (variant.target, variant.precision) == (target, precision):
                return with_files(bundle, variant)
        return with_shapes(known_shapes(manifest), tuple(model.name for model in manifest.models), target, precision, 0)

    return Request(
        manifest.family, f"{bundle.folder}: {' + '.join(model.name for model in manifest.models)}", tuple(manifest.experts),
        context or manifest.max_seq_len, manifest.max_seq_len, shared, 0, frozenset(variant.target for variant in manifest.variants), precisions, build,
    )  # fmt: skip


def precisions_of(target: str) -> list[str]:
    """All that can be exported for a target, the fastest first."""
    return fastest_first(exported_for(target), target)


def with_shapes(models: Sequence[Shape], names: tuple[str, ...], target: str, precision: str, rank: int) -> System:
    """A system of known shapes; `rank` above 0: experts are factors of that rank."""
    fmt = format_of(target, precision)
    own = [weights_of(models[0], fmt), *(factors_of(shape, rank, target) if rank else weights_of(shape, fmt) for shape in models[1:])]
    kv_bits = 32 if target == CPU or precision == "fp32" else 16
    return System(
        precision, fmt.body, names, tuple(own), tuple(shape.layers for shape in models), tuple(shape.kv_values for shape in models),
        kv_bits, models[0].vocab, rank > 0,
    )  # fmt: skip


def with_files(bundle: Bundle, variant: Variant) -> System:
    """A system from a bundle's files: the weights that its graphs name."""
    manifest = bundle.manifest
    stored = {name: bundle.stored_bytes(path) for name, path in variant.graphs.items()}
    if variant.pair is not None:
        first = manifest.models[0].name
        stored[first] = sum(bundle.stored_bytes(path) for path in variant.pair.graph_paths)
        stored |= {name: manifest.files[path].bytes for name, path in variant.pair.factors.items()}
    record = PRECISIONS.get(variant.precision)
    bits = max(variant.bits_per_weight, record.rank(variant.target) if record else 0)  # a CPU widens some when it loads them
    widened = bits / variant.bits_per_weight if bits >= HALF else 1.0
    weights = [
        Weights(
            int(stored[model.name] * widened),
            int(variant.weight_bytes.get(model.name, stored[model.name]) * widened),
            model.parameters,
        )
        for model in manifest.models
    ]
    return System(
        variant.precision, bits, tuple(model.name for model in manifest.models), tuple(weights),
        tuple(model.layers for model in manifest.models), tuple(kv_values(model) for model in manifest.models),
        variant.kv_bits, manifest.vocab_size, variant.pair is not None,
    )  # fmt: skip


def kv_values(model: Model) -> int:
    """Values of keys and values for a token of the text."""
    return 2 * model.layers * model.kv_heads * model.head_size


def known_shapes(manifest: Manifest) -> list[Shape]:
    """The published shapes of a bundle's models; empty where one of them has none."""
    of_models = []
    for model in manifest.models:
        key = (model.parameters, model.layers, model.kv_heads, model.head_size)
        same = [shape for shape in shapes() if (shape.parameters, shape.layers, shape.kv_heads, shape.head_size) == key]
        of_models += [shape for shape in same if shape.vocab == manifest.vocab_size][:1]
    return of_models if len(of_models) == len(manifest.models) else []
