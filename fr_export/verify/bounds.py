"""Which bounds a report misses. The bounds stand in runtime/precisions.py, in the record of each precision."""

from collections.abc import Mapping
from typing import Any

from fusionroute.fr_export.verify.hints import hint, kv_bounds
from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.precisions import PRECISIONS

AT_LEAST = {
    "greedy_agreement": "top-1 agreement",
    "sure_agreement": "top-1 agreement beyond one logit",
    "routing_agreement": "routing agreement",
}
AT_MOST = {"perplexity_ratio": "perplexity", "kl_mean": "mean KL divergence"}


def misses(target: str, precision: str, compared: Mapping[str, Any] | None, kv: str | None = None) -> list[str]:
    """A phrase for every bound that a variant misses, in chunks or token by token.

    `compared` is the result of `compare`; without one nothing is missed. `kv`: the precision of keys and values, where it
    is not that of the activations.
    """
    phrases: list[str] = []
    if compared is None:
        return phrases
    for how, manner in (("chunks", "in chunks"), ("decode", "token by token")):
        for name, bound in PRECISIONS[precision].bounds_for(target, kv_bounds(kv)).items():
            value = compared[how][name]
            if value is None or (value >= bound if name in AT_LEAST else value <= bound):
                continue
            label = AT_LEAST.get(name) or AT_MOST[name]
            chance = f" ± {error:.2%}" if name == "perplexity_ratio" and (error := compared[how].get("perplexity_error")) else ""
            phrases.append(f"{label} {manner} {shown(name, value)}{chance}, bound {shown(name, bound)}")
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
                f"The precision {entry['precision']} misses its bound ({'; '.join(entry['missed'])}); {hint(entry)}, "
                "or export without --strict."
            )


def shown(name: str, value: float) -> str:
    """A figure for people."""
    if name == "perplexity_ratio":
        return f"{value - 1:+.2%}"
    return f"{value:.2%}" if name in AT_LEAST else f"{value:.2g}"
