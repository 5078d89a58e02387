"""Whether an engine is the one that the manifest describes: buffers are bound by address."""

from __future__ import annotations

from fusionroute.runtime.errors import BundleError
from fusionroute.runtime.limits import EXPERT
from fusionroute.runtime.manifest import Model as Spec
from fusionroute.runtime.tensorrt.loading import BYTES, Engine
from fusionroute.runtime.tensorrt.shared import Shared


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
    logits = all(engine.shapes.get(f"{prefix}logits", ())[-1:] == (shared.vocab,) for prefix in prefixes)
    if caches != expected or not known or not logits or engine.shapes.get("routing", (0,))[-1] != routed or engine.on_host:
        raise BundleError(
            f"The engine of {engine.name} does not have the inputs and outputs that the manifest describes; "
            f"rebuild it with `fusionroute build {bundle}`."
        )
