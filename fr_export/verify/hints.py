"""What to try first where a precision misses its bound."""

import math
from collections.abc import Mapping
from typing import Any

from fusionroute.fr_export.precision import SCHEMES
from fusionroute.fr_export.precision.scheme import Fitting
from fusionroute.runtime.kv_precisions import KV_PRECISIONS
from fusionroute.runtime.precisions import PRECISIONS, Bounds, exported_for


def hint(entry: Mapping[str, Any]) -> str:
    """The remedy for a variant of a report that misses its bound: a part of a sentence that begins with a verb."""
    if by_chance(entry):
        return f"compare on more text (--compare {10 * entry['compared']['tokens']}), since so little text says no more than that"
    if entry.get("kv"):
        return f"export it without --kv {entry['kv']}"
    precision, target = entry["precision"], entry["target"]
    bits = PRECISIONS[precision].bits
    if bits >= 32:
        return "report this fault with report.json, since fp32 rounds nothing"
    wider = [name for name in exported_for(target) if PRECISIONS[name].bits > bits]
    instead = f"export {min(wider, key=lambda name: PRECISIONS[name].bits)} instead" if wider else "leave it out"
    if not isinstance(SCHEMES[target][precision], Fitting):
        return instead
    if not entry["calibrated"]:
        return "calibrate it by leaving out --calibration none"
    remedy = f"calibrate on more prompts of your own (--calibration FILE) or {instead}"
    if any(phrase.startswith("routing") for phrase in entry["missed"]):
        return f"{remedy}, since rounding turns the choice between experts, and where another one answers KL is high too"
    return remedy


def by_chance(entry: Mapping[str, Any]) -> bool:
    """Whether all that a variant misses is a perplexity within two standard errors of its bound."""
    bound = PRECISIONS[entry["precision"]].bounds_for(entry["target"], kv_bounds(entry.get("kv"))).get("perplexity_ratio")
    if bound is None or not all(phrase.startswith("perplexity") for phrase in entry["missed"]):
        return False
    figures = [entry["compared"][how] for how in ("chunks", "decode")]
    return all(each["perplexity_ratio"] <= bound * math.exp(2 * (each.get("perplexity_error") or 0)) for each in figures)


def kv_bounds(kv: str | None) -> Bounds | None:
    """The bounds of a variant's keys and values; None where they lose nothing beside the activations."""
    return None if kv is None else KV_PRECISIONS[kv].bounds
