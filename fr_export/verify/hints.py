"""What to try first where a precision misses its bound."""

from collections.abc import Mapping
from typing import Any

from fusionroute.fr_export.precision import SCHEMES
from fusionroute.fr_export.precision.scheme import Fitting
from fusionroute.runtime.precisions import PRECISIONS, exported_for


def hint(entry: Mapping[str, Any]) -> str:
    """The remedy for a variant of a report that misses its bound, in one or two sentences."""
    precision, target = entry["precision"], entry["target"]
    bits = PRECISIONS[precision].bits
    if bits >= 32:
        return "fp32 rounds nothing, so this is a fault: please report it with report.json."
    wider = [name for name in exported_for(target) if PRECISIONS[name].bits > bits]
    instead = f"export {min(wider, key=lambda name: PRECISIONS[name].bits)} instead" if wider else "leave it out"
    if not isinstance(SCHEMES[target][precision], Fitting):
        return f"{instead[0].upper()}{instead[1:]}."
    if not entry["calibrated"]:
        return "It was rounded without calibration: leave out --calibration none."
    remedy = f"calibrate on more prompts of your own (--calibration FILE), or {instead}."
    if any(phrase.startswith("routing") for phrase in entry["missed"]):
        return f"Rounding turns the choice between experts, and where another one answers KL is high too: {remedy}"
    return f"{remedy[0].upper()}{remedy[1:]}"
