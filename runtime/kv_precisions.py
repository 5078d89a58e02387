"""The table of precisions of keys and values: how a cache stores them, and on which targets."""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

KvName = Literal["fp32", "fp16", "int8", "int4", "fp8"]


class KvPrecision(NamedTuple):
    """bits: of one value. bounds: the most that a precision may lose which loses something, as in `precisions.Precision`;
    None: it loses nothing beside the activations.
    """

    bits: int
    bounds: Mapping[str, float] | None = None

    @property
    def quantised(self) -> bool:
        """Whether values are stored as integers, in steps that calibration gives."""
        return self.bounds is not None


KV_PRECISIONS: dict[str, KvPrecision] = {
    "fp32": KvPrecision(32),
    "fp16": KvPrecision(16),
    "int8": KvPrecision(
        8, {"greedy_agreement": 0.98, "sure_agreement": 0.995, "routing_agreement": 0.99, "perplexity_ratio": 1.003, "kl_mean": 0.003}
    ),
    "int4": KvPrecision(4, {"perplexity_ratio": 1.15}),
    "fp8": KvPrecision(8, {"perplexity_ratio": 1.003}),
}
# Targets whose caches can have another type than the activations. The CPU kernels of ONNX Runtime read fp16 more slowly
# than fp32, and know no fp8.
CHOICES: dict[str, tuple[str, ...]] = {"ort:cpu": ("fp32", "int8", "int4")}


def refusal(kv: str, targets: Iterable[str]) -> str | None:
    """Why targets cannot have a precision of keys and values, without a full stop; None: they can."""
    for target in targets:
        if target not in CHOICES:
            return f"{target} keeps keys and values in the type of its activations; leave out --kv, or export {target} without it"
        if kv not in CHOICES[target]:
            return f"{target} keeps no keys and values in {kv}; name one of {', '.join(CHOICES[target])}"
    return None
