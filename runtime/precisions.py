"""The table of precisions: one record each, from which the exporter, its report and the runtime's default are made.

A new precision is one record here and one file with its schemes in fr_export/precision.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fusionroute.runtime.errors import FusionError

CPU = "ort:cpu"
Bounds = Mapping[str, float]  # figure of the report → its bound: agreements at least, losses at most


@dataclass(frozen=True)
class Precision:
    """What every part of the project has to know of one precision.

    bits: of one weight, without its scales.
    bounds: the most that an export may lose against torch in fp32; `bounds_on` replaces them for some targets.
    help: for the help text of --precision.
    targets: what it can be exported for, that is, for which it has a scheme in fr_export/precision.
    calibrated_on: targets on which it cannot do without calibration, which gives its activations their scales.
    least_sm: compute capability from which on GPUs have its types (89 for SM89).
    cpu_bits: bits per weight that ONNX Runtime reads on a CPU, where it widens the weights on loading.
    Raises FusionError where there is no bound.
    """

    name: str
    bits: int
    bounds: Bounds
    help: str
    targets: tuple[str, ...]
    calibrated_on: tuple[str, ...] = ()
    least_sm: int = 0
    cpu_bits: int | None = None
    bounds_on: Mapping[str, Bounds] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.bounds or not all(self.bounds_on.values()):
            raise FusionError(f"The precision '{self.name}' has no bound: give its record in runtime/precisions.py the most it may lose.")

    def rank(self, target: str) -> int:
        """Bits per weight that decoding a token reads. Decoding waits for memory, so the lowest is the fastest."""
        return self.cpu_bits if target == CPU and self.cpu_bits is not None else self.bits

    def bounds_for(self, target: str, kv: Bounds | None = None) -> Bounds:
        """The bounds on a target. `kv`: those of keys and values, where they lose something too: what both bound may lose
        what the weaker bound allows.
        """
        own = self.bounds_on.get(target.removesuffix(":10.3"), self.bounds)
        if kv is None:
            return own
        return {name: (min if name.endswith("agreement") else max)(bound, kv[name]) for name, bound in own.items() if name in kv}


FP16: Bounds = {"greedy_agreement": 0.995, "routing_agreement": 0.995, "perplexity_ratio": 1.002, "kl_mean": 1e-3}
BF16: Bounds = {"greedy_agreement": 0.99, "routing_agreement": 0.99, "perplexity_ratio": 1.01, "kl_mean": 5e-3}
INT8: Bounds = {
    "greedy_agreement": 0.95, "sure_agreement": 0.995, "routing_agreement": 0.98, "perplexity_ratio": 1.01, "kl_mean": 0.01,
}  # fmt: skip
W8A8: Bounds = {"perplexity_ratio": 1.02}

ENGINES = ("tensorrt", "tensorrt:10.3")

# Of equal rank the first is the default. On a CPU that is fp32, which is as fast there as half precision and exact.
RECORDS = (
    Precision(
        "fp32", 32, {"greedy_agreement": 0.999, "routing_agreement": 0.999, "perplexity_ratio": 1.0005, "kl_mean": 1e-6},
        "the checkpoint's values as they are", ("ort:cpu", "portable", *ENGINES),
    ),
    # near ties of tokens fall the other way where activations are in half precision too
    Precision(
        "fp16", 16, FP16, "half precision", ("ort:cpu", "ort:cuda", "portable", *ENGINES),
        cpu_bits=32, bounds_on={"tensorrt": {**FP16, "greedy_agreement": 0.99}},
    ),
    # 8 bits of mantissa throughout also move near ties of experts (measured: docs/precision.md, docs/tensorrt.md)
    Precision(
        "bf16", 16, BF16, "half precision with fp32's range", ("ort:cpu", "ort:cuda", *ENGINES),
        cpu_bits=32, bounds_on={"tensorrt": {**BF16, "greedy_agreement": 0.97, "routing_agreement": 0.98}},
    ),
    # TensorRT's int8 has static 8-bit activations, as w8a8 has
    Precision(
        "int8", 8, INT8, "8-bit weights; for tensorrt also 8-bit activations", ("ort:cpu", "portable", *ENGINES),
        calibrated_on=ENGINES, bounds_on={"tensorrt": W8A8},
    ),
    Precision(
        "fp8", 8, {"perplexity_ratio": 1.01}, "8-bit floats as weights and activations, for GPUs from SM89 on; tensorrt only", ("tensorrt",),
        calibrated_on=("tensorrt",), least_sm=89,
    ),
    Precision("int8-wo", 8, {"perplexity_ratio": 1.01}, "8-bit weights, activations in half precision; tensorrt only", ENGINES),
    Precision("int4", 4, {"perplexity_ratio": 1.15}, "4-bit weights", ("ort:cpu", "tensorrt")),
    Precision(
        "nvfp4", 4, {"perplexity_ratio": 1.25}, "4-bit floats as weights and activations, for GPUs from SM100 on; tensorrt only",
        ("tensorrt",), calibrated_on=("tensorrt",), least_sm=100,
    ),
    # ONNX Runtime computes its Q/DQ products on a CPU in fp32
    Precision(
        "w8a8", 8, W8A8, "8-bit weights and activations with static scales, to see on a CPU what they lose", ("ort:cpu",),
        calibrated_on=("ort:cpu",), cpu_bits=32,
    ),
)  # fmt: skip
PRECISIONS: dict[str, Precision] = {precision.name: precision for precision in RECORDS}


def exported_for(target: str) -> tuple[str, ...]:
    """The names of the precisions that a target has, in the order of the records. Empty for an unknown target."""
    return tuple(precision.name for precision in RECORDS if target in precision.targets)


def fastest_first(names: Iterable[str], target: str) -> list[str]:
    """The names of precisions by speed on a target; unknown ones, such as of a newer exporter, come last."""
    order = sorted(RECORDS, key=lambda precision: precision.rank(target))
    places = {precision.name: place for place, precision in enumerate(order)}
    return sorted(names, key=lambda name: places.get(name, len(places)))
