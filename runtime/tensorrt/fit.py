"""Whether an engine is the one that the manifest describes: buffers are bound by address."""

from __future__ import annotations

from fusionroute.runtime.errors import BundleError
from fusionroute.runtime.limits import EXPERT
from fusionroute.runtime.manifest import Model as Spec
from fusionroute.runtime.tensorrt.loading import BYTES, Engine
from fusionroute.runtime.tensorrt.shared import Shared

TEXT = ("input_ids", "write_index", "key_positions", "logit_positions")


def check(engine: Engine, spec: Spec, shared: Shared, routed: int, bundle: str, prefixes: tuple[str, ...] = ("",)) -> None:
    """Raise BundleError unless an engine's tensors are those of the manifest.

    `routed`: how many experts it routes to. `prefixes`: of the names of each model's tensors.
    """
    kv = (1, spec.kv_heads, shared.capacity, spec.head_size)
    rest = {"new": (1, spec.kv_heads, -1, spec.head_size)} if "new.0.key" in engine.shapes else {"present": kv}
    kinds = {f"{prefix}{when}": shape for prefix in prefixes for when, shape in ({"past": kv} | rest).items()}
    expected = {f"{when}.{layer}.{kind}": kinds[when] for when in kinds for layer in range(spec.layers) for kind in ("key", "value")}
    beginnings = tuple(f"{prefix}{when}." for prefix in ("", EXPERT) for when in ("past", "present", "new"))
    caches = {name: shape for name, shape in engine.shapes.items() if name.startswith(beginnings)}
    known = all(engine.types[name] in BYTES for name in caches)
    text = [f"{prefix}{name}" for prefix in prefixes for name in TEXT]
    known = known and all(engine.types.get(name) == "INT64" for name in text)
    logits = all(engine.shapes.get(f"{prefix}logits", ())[-1:] == (shared.vocab,) for prefix in prefixes)
    if caches != expected or not known or not logits or engine.shapes.get("routing", (0,))[-1] != routed or engine.on_host:
        raise BundleError(
            f"The engine of {engine.name} does not have the inputs and outputs that the manifest describes; "
            f"rebuild it with `fusionroute build {bundle}`."
        )


def check_fusion(engine: Engine, vocab: int, bundle: str) -> None:
    """Raise BundleError unless an engine's tensors are those of the fusion graph."""
    inputs = {"coefficients": "FLOAT", "penalty": "FLOAT", "temperature": "FLOAT", "k": "INT64", "penalty_ids": "INT64"}
    outputs = {"candidate_ids": "INT64"} | dict.fromkeys(
        ("candidate_logits", "unpenalised", "log_normaliser", "sampling_normaliser"), "FLOAT"
    )
    rows = dict.fromkeys(("router_logits", "expert_logits", "fused"), "FLOAT")
    wide = all(engine.shapes.get(name, ())[-1:] in ((vocab,), (-1,)) for name in rows)
    if engine.types != inputs | outputs | rows or not wide:
        raise BundleError(
            f"The engine of {engine.name} does not have the inputs and outputs of the fusion graph; "
            f"rebuild it with `fusionroute build {bundle}`."
        )
