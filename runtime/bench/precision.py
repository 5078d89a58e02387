"""The size of one of a bundle's precisions, and its quality from the bundle's report."""

from __future__ import annotations

import json
from dataclasses import dataclass

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.manifest import Variant
from fusionroute.runtime.process_memory import Resident

QUALITY = ("perplexity_ratio", "kl_mean", "greedy_agreement", "routing_agreement")  # of report.json, token by token


@dataclass(frozen=True)
class LoadedPrecision:
    """Bytes on disk of graphs and weights, or of engines; `quality` as in the bundle's report. None: not known.

    kv_bytes_per_token: of keys and values in the caches of all models.
    memory: the largest growth of this process while it was loaded and generated once. device_memory: bytes of the GPU's
    memory that it took.
    """

    name: str
    bits_per_weight: float
    kv_bytes_per_token: int
    bytes: int | None
    quality: dict[str, float | None] | None
    load_seconds: float
    memory: Resident
    device_memory: int | None


def size_and_quality(bundle: Bundle, variant: Variant, flavour: str | None) -> tuple[int | None, dict[str, float | None] | None]:
    """From the manifest and report.json; `flavour`: of the engines, where engines run."""
    report = json.loads(bundle.text("report.json") or "{}")
    entries = [each for each in report.get("variants", ()) if (each["target"], each["precision"]) == (variant.target, variant.precision)]
    entry = entries[0] if entries else {}
    compared = entry.get("compared")
    quality = {name: compared["decode"].get(name) for name in QUALITY} if compared else None
    if flavour is None:
        return entry.get("bytes"), quality
    built = next((each for each in variant.engines if each.flavour == flavour), None)
    files = bundle.manifest.files
    return None if built is None else sum(files[path].bytes for path in built.engines.values()), quality
