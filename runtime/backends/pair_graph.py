"""A graph that reads two segments of one sequence: its inference session, its sizes, and what fits its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fusionroute.runtime.backend import Arrays
from fusionroute.runtime.backends import ort
from fusionroute.runtime.backends.hidden_rows import Head
from fusionroute.runtime.backends.signature import FLOAT, ORT_LENGTHS, CacheValue, Signature, Value, Values, of_model, of_pair
from fusionroute.runtime.limits import DELTA, EXPERT

if TYPE_CHECKING:
    from fusionroute.runtime.bundle import Bundle
    from fusionroute.runtime.manifest import Model


class PairGraph:
    """The inference session and its sizes. rows: those of the routing head that have an expert; None: all of them."""

    def __init__(
        self, session: Any, run_options: Callable[[], Any], spec: Model, capacity: int, result: tuple[str, int], head: Head | None,
        head_rows: int,
    ):  # fmt: skip
        """result: the name and width of the output that a model answers with. head: what makes logits of it, None where
        it is logits.
        """
        self.session, self.run_options, self.spec = session, run_options, spec
        self.capacity, self.result, self.head, self.head_rows = capacity, result, head, head_rows
        self.rows: list[int] | None = None
        self.seconds = 0.0  # that its runs have taken
        values = (*session.get_inputs(), *session.get_outputs())
        self._shapes: dict[str, tuple[int | str, ...]] = {value.name: tuple(value.shape) for value in values}
        self.deltas = {name: shape for name, shape in self._shapes.items() if name.startswith(DELTA)}

    def check(self, bundle: Bundle, name: str, caches: CacheValue, factor_types: tuple[str, ...] = FLOAT) -> None:
        """Raise BundleError unless its inputs and outputs are those of the manifest. caches: what keys and values are stored as."""
        own = of_model(self.spec, self.capacity, self.result, self.head_rows, ORT_LENGTHS, caches)
        factors = {delta: Value(factor_types, (None,) * len(shape)) for delta, shape in self.deltas.items()}
        ort.check(self.session, self.signature(own, factors), bundle, name, self.capacity)

    def signature(self, own: Signature, factors: Values) -> Signature:
        """Its inputs and outputs, from those of one model and those that factors are bound to."""
        return of_pair(own, EXPERT, factors)

    def unfit(self, factors: Arrays) -> str | None:
        """The first input that an expert's factors do not fit; None: they fit. Names in a shape stand for any rank."""
        for name, shape in self.deltas.items():
            given = factors[name].shape if name in factors else ()
            if len(given) != len(shape) or any(isinstance(size, int) and size != other for size, other in zip(shape, given, strict=True)):
                return name
        return None
