"""The backend of a runtime whose models share one base on the CPU. Needs no torch."""

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backends.ort_pair import OrtPair


def pair_of(rt: FusionRuntime) -> OrtPair:
    """The backend, which must be that of a pair."""
    backend = rt.backend
    assert isinstance(backend, OrtPair)
    return backend
