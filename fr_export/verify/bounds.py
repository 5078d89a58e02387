"""What each precision may lose against fp32: the table that reports are held to."""

from collections.abc import Mapping
from typing import Any

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
# where a target computes otherwise than the name says elsewhere: activations in half precision, or in 8 bits by tensor
OWN: dict[tuple[str, str], dict[str, float]] = {
    ("tensorrt", "fp16"): BOUNDS["fp16"] | {"greedy_agreement": 0.99},
    # eight bits of mantissa throughout move near ties of tokens, and of experts (measured: docs/precision.md, docs/tensorrt.md)
    ("tensorrt", "bf16"): BOUNDS["bf16"] | {"greedy_agreement": 0.97, "routing_agreement": 0.98},
    ("tensorrt", "int8"): BOUNDS["w8a8"],
}


def misses(target: str, precision: str, compared: Mapping[str, Any] | None) -> list[str]:
    """Every bound that a precision of a target does not keep, in chunks or token by token, in words. `compared` is that of `compare`, or None."""
    found: list[str] = []
    if compared is None:
        return found
    for how, manner in (("chunks", "in chunks"), ("decode", "token by token")):
        for name, bound in (OWN.get((target.removesuffix(":10.3"), precision)) or BOUNDS[precision]).items():
            value = compared[how][name]
            if value is None or (value >= bound if name in AT_LEAST else value <= bound):
                continue
            label = AT_LEAST.get(name) or AT_MOST[name]
            found.append(f"{label} {manner} {shown(name, value)}, bound {shown(name, bound)}")
    return found


def shown(name: str, value: float) -> str:
    """A figure for people."""
    if name == "perplexity_ratio":
        return f"{value - 1:+.2%}"
    return f"{value:.2%}" if name in AT_LEAST else f"{value:.2g}"
