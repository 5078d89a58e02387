"""What each precision may lose against fp32, and which bounds a report misses."""

from collections.abc import Mapping, Sequence
from typing import Any

from fusionroute.runtime.errors import FusionError

AT_LEAST = {
    "greedy_agreement": "top-1 agreement",
    "sure_agreement": "top-1 agreement beyond one logit",
    "routing_agreement": "routing agreement",
}
AT_MOST = {"perplexity_ratio": "perplexity", "kl_mean": "mean KL divergence"}
BOUNDS: dict[str, dict[str, float]] = {
    "fp32": {"greedy_agreement": 0.999, "routing_agreement": 0.999, "perplexity_ratio": 1.0005, "kl_mean": 1e-6},
    "fp16": {"greedy_agreement": 0.995, "routing_agreement": 0.995, "perplexity_ratio": 1.002, "kl_mean": 1e-3},
    "bf16": {"greedy_agreement": 0.99, "routing_agreement": 0.99, "perplexity_ratio": 1.01, "kl_mean": 5e-3},
    "int8": {"greedy_agreement": 0.95, "sure_agreement": 0.995, "routing_agreement": 0.98, "perplexity_ratio": 1.01, "kl_mean": 0.01},
    "int4": {"perplexity_ratio": 1.15},
    "int8-wo": {"perplexity_ratio": 1.01},
    "w8a8": {"perplexity_ratio": 1.02},
}
# Targets that compute differently: with activations in half precision, or in 8 bits with one scale per tensor.
OWN: dict[tuple[str, str], dict[str, float]] = {
    ("tensorrt", "fp16"): BOUNDS["fp16"] | {"greedy_agreement": 0.99},
    # With 8 bits of mantissa everywhere, near ties of tokens and experts flip (docs/precision.md, docs/tensorrt.md).
    ("tensorrt", "bf16"): BOUNDS["bf16"] | {"greedy_agreement": 0.97, "routing_agreement": 0.98},
    ("tensorrt", "int8"): BOUNDS["w8a8"],
}


def bounds_of(target: str, precision: str) -> dict[str, float]:
    """The bounds of a precision on a target: figure → smallest or largest value. Raises FusionError without any."""
    bounds = OWN.get((target.removesuffix(":10.3"), precision), BOUNDS.get(precision))
    if bounds is None:
        raise FusionError(
            f"The precision {precision} for {target} has no bound: say in verify/bounds.py what it may lose, or leave it out."
        )
    return bounds


def check_bounds(variants: Sequence[tuple[str, str]]) -> None:
    """Refuse, before any work, a (target, precision) that nothing would be held to at the end. Raises FusionError."""
    for target, precision in variants:
        bounds_of(target, precision)


def misses(target: str, precision: str, compared: Mapping[str, Any] | None) -> list[str]:
    """A phrase for every bound that a variant misses, in chunks or token by token.

    `compared` is the result of `compare`; without one nothing is missed. Raises FusionError as `bounds_of` does.
    """
    phrases: list[str] = []
    if compared is None:
        return phrases
    for how, manner in (("chunks", "in chunks"), ("decode", "token by token")):
        for name, bound in bounds_of(target, precision).items():
            value = compared[how][name]
            if value is None or (value >= bound if name in AT_LEAST else value <= bound):
                continue
            label = AT_LEAST.get(name) or AT_MOST[name]
            phrases.append(f"{label} {manner} {shown(name, value)}, bound {shown(name, bound)}")
    return phrases


def refuse_missed(report: Mapping[str, Any]) -> None:
    """Raises FusionError where a variant of a report misses its bound, or could not be compared at all."""
    if report["not_compared"]:
        raise FusionError(f"No precision could be compared with torch ({report['not_compared']}); export without --strict.")
    for entry in report["variants"]:
        if entry["not_compared"]:
            raise FusionError(
                f"The precision {entry['precision']} for {entry['target']} could not be compared with torch ({entry['not_compared']}); "
                "leave it out, or export without --strict."
            )
        if entry["missed"]:
            raise FusionError(
                f"The precision {entry['precision']} misses its bound ({'; '.join(entry['missed'])}); leave it out, or export without --strict."
            )


def shown(name: str, value: float) -> str:
    """A figure for people."""
    if name == "perplexity_ratio":
        return f"{value - 1:+.2%}"
    return f"{value:.2%}" if name in AT_LEAST else f"{value:.2g}"
