"""Stage 3, precisions: how a traced graph's matrices are rounded, stored and read.

A precision is one file here (or in qdq/, for targets that read Q/DQ) that ends with SCHEMES: target → its schemes; and
one record in runtime/precisions.py.

scheme.py           what a scheme does
fit_context.py      what a scheme is given to fit one model; fit_model.py: a model's graph and scheme, ready to bind
fp32 … w8a8         the schemes
row_int8.py         8 bits by row: wide matrices of int8, and the texts that calibration records
blockwise.py        matrices in blocks with scales, as ONNX Runtime's operators read them
gptq.py             rounding that compensates for its own errors; gptq_sequential.py: the same for a whole model
kernels.py          their loops over single weights, compiled by numba
sensitive.py        which matrices need more bits
smoothquant.py      evens out the channels of activations
plan_w8a8.py        which products take 8-bit activations; rounding.py: what these would cost
calibrate.py        statistics of a system's own texts; evidence.py: one model's part of them
approximation.py    low-rank factors of full fine-tunes on a base; rank_budget.py: their ranks; read_back.py: the base as it is read
bind_weights.py     fills a graph with one model's weights
"""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import walk_packages

from fusionroute.fr_export.precision.scheme import Scheme, Schemes
from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.precisions import PRECISIONS


def collect(modules: Mapping[str, Schemes]) -> dict[str, dict[str, Scheme]]:
    """Target → name → scheme, in the order of the records. `modules`: the SCHEMES of each module, by the module's name.

    Raises FusionError for a scheme without a record, which would have no bound, and for one whose record lacks the
    target: the command line knows by the records what there is.
    """
    by_target: dict[str, dict[str, Scheme]] = {}
    for module, schemes in modules.items():
        for target, target_schemes in schemes.items():
            for scheme in target_schemes:
                if scheme.name not in PRECISIONS:
                    raise FusionError(
                        f"The precision '{scheme.name}' of {module} has no record and so no bound: add one to runtime/precisions.py."
                    )
                if target not in PRECISIONS[scheme.name].targets:
                    raise FusionError(
                        f"{module} has the precision '{scheme.name}' for {target}, which its record does not name: "
                        "add the target to the record in runtime/precisions.py."
                    )
                by_target.setdefault(target, {})[scheme.name] = scheme
    return {target: {name: by_target[target][name] for name in PRECISIONS if name in by_target[target]} for target in sorted(by_target)}


MODULES = [import_module(module.name) for module in walk_packages(__path__, f"{__name__}.")]
SCHEMES = collect({module.__name__: module.SCHEMES for module in MODULES if hasattr(module, "SCHEMES")})

__all__ = ["SCHEMES", "Scheme"]
