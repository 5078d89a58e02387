"""Which bounds a precision misses; the bounds stand in its record, runtime/precisions.py."""

from collections.abc import Mapping
from typing import Any

from fusionroute.runtime.precisions import PRECISIONS

AT_LEAST = {
    "greedy_agreement": "top-1 agreement",
    "sure_agreement": "top-1 agreement beyond one logit",
    "routing_agreement": "routing agreement",
}
AT_MOST = {"perplexity_ratio": "perplexity", "kl_mean": "mean KL divergence"}


def misses(target: str, precision: str, compared: Mapping[str, Any] | None) -> list[str]:
    """Every bound that a precision of a target misses, in chunks or token by token, in words. `compared` is that of
    `compare`, or None.
    """
    sentences: list[str] = []
    if compared is None:
        return sentences
    for how, manner in (("chunks", "in chunks"), ("decode", "token by token")):
        for name, bound in PRECISIONS[precision].bounds_for(target).items():
            value = compared[how][name]
            if value is None or (value >= bound if name in AT_LEAST else value <= bound):
                continue
            label = AT_LEAST.get(name) or AT_MOST[name]
            sentences.append(f"{label} {manner} {shown(name, value)}, bound {shown(name, bound)}")
    return sentences


def shown(name: str, value: float) -> str:
    """A figure for people."""
    if name == "perplexity_ratio":
        return f"{value - 1:+.2%}"
    return f"{value:.2%}" if name in AT_LEAST else f"{value:.2g}"
