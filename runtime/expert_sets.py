"""The experts of a loaded system: a set that never changes, and the exchange of one set for another.

A session, or a stream, keeps the set that it began with, so that its tokens do not depend on when somebody else adds or
removes an expert. Sessions that begin later have the new set. All sets share the loaded base.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

from fusionroute.runtime.arguments import shown
from fusionroute.runtime.backend import Arrays, SharedBase
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.decoder import Decoder
from fusionroute.runtime.errors import InputError, NumericalError, UnavailableError
from fusionroute.runtime.generation import Generation
from fusionroute.runtime.loaded_system import LoadedSystem
from fusionroute.runtime.options import RuntimeOptions
from fusionroute.runtime.pool import Pool
from fusionroute.runtime.scoring import Scores, score
from fusionroute.runtime.session import Session
from fusionroute.runtime.stream import End, Stream
from fusionroute.runtime.text import Text, Token

if TYPE_CHECKING:
    from fusionroute.runtime.read_along import PassPrices
    from fusionroute.runtime.speculation.costs import Costs


@dataclass(frozen=True)
class ExpertSet:
    """A system with some experts, the idle decoders of its texts, and what its passes cost.

    `costs` None: no speculation. `prices` None: no more than one expert reads beside the router.
    """

    system: LoadedSystem
    pool: Pool
    costs: Costs | None
    eos: frozenset[int]
    prices: PassPrices | None

    @property
    def names(self) -> list[str]:
        """In the order of the routing head's rows."""
        return self.system.expert_names

    def index(self, expert: str | None) -> int | None:
        """The index of a named expert. Raises InputError for a name that is none."""
        if expert is None:
            return None
        if not isinstance(expert, str) or expert not in self.names:  # an array would be compared element by element
            raise InputError(f"Unknown expert {shown(expert)}: use one of {', '.join(self.names)}.")
        return self.names.index(expert)

    def decoder(self) -> Decoder:
        """A new decoder. Raises ClosedError."""
        return Decoder(self.system, self.costs, self.eos, self.prices)

    def session(self, tokenizer: Text | None, fusion: str, lam: float, expert: str | None) -> Session:
        """A new session, see `FusionRuntime.session`. Raises InputError for an unknown expert, ClosedError."""
        return Session(self.decoder, self.give_back, self.names, tokenizer, fusion, lam, self.index(expert))

    def stream(self, ids: Sequence[int], generation: Generation) -> Stream:
        """The tokens behind a prompt. Raises InputError as `Decoder.append` does."""
        decoder = self.pool.take(ids, self.decoder)
        try:
            decoder.restart(ids)
        except BaseException:
            self.give_back(decoder)
            raise

        def tokens() -> Generator[Token | End, None, None]:
            try:
                yield from generation.tokens(decoder)
            except NumericalError:
                self.pool.empty()  # they may have lent, or kept, what is not finite
                raise

        return Stream(tokens(), lambda: self.give_back(decoder))

    def score(self, ids: Sequence[int], positions: Sequence[int], chunk: int, coefficients: tuple[float, float]) -> Scores:
        """See `FusionRuntime.score`. Raises InputError as `Decoder.append` does, NumericalError."""
        decoder = self.pool.take((), self.decoder)
        try:
            decoder.rewind(0)
            decoder.append(ids)
            step = decoder.step
            return score(decoder.readers, step.fuser, step.numerics, self.system.vocab_size, positions, chunk, coefficients)
        except NumericalError as error:
            decoder.discard(error)
            raise
        finally:
            self.give_back(decoder)

    def give_back(self, decoder: Decoder) -> None:
        """A text is over: its decoder waits for another one, unless the experts are others by now."""
        decoder.sequence.cancellation = None
        decoder.readers.pause()
        if not self.system.forked:
            self.pool.give(decoder)


class ExpertSets:
    """`current`: the set that new sessions have."""

    def __init__(self, bundle: Bundle, options: RuntimeOptions):
        """Loads the bundle's models. Raises FusionError subclasses only: BundleError, UnavailableError, InputError."""
        system = LoadedSystem(bundle, options)
        costs = None
        if options.speculation != "off":
            from fusionroute.runtime.speculation.costs import costs_of  # here: a tenth of the time of `import fusionroute`

            costs = costs_of(bundle, system.backend, system.precision, options.threads)
        prices = None
        if system.backend.forward_together is not None and not system.background_prefill:  # else experts are near anyway
            from fusionroute.runtime.speculation.pass_prices import prices_of  # here: see above

            prices = prices_of(bundle, system.backend, system.precision, options.threads, options.exact)
        self._bundle, self._prefixes = bundle, options.prefix_cache
        self._lock = threading.Lock()  # of those who change or close
        self._systems = WeakSet([system])  # of all sets that a session still has
        self.current = ExpertSet(system, self._pool(system), costs, frozenset(bundle.manifest.eos_token_ids), prices)

    def add(self, source: Path, name: str) -> None:
        """Give new sessions an expert more, or another one of that name. Raises as `FusionRuntime.add_expert`."""
        from fusionroute.runtime.adapters.expert_files import open_expert  # here: pydantic

        self._shared()  # says so before the lock is taken: a thread that stayed behind a fork may hold it
        with self._lock:
            system = self.current.system
            backend = self._shared()
            pair = self._bundle.variant(backend.target, system.precision).pair
            expert = open_expert(self._bundle, name, source)
            assert pair is not None
            arrays = expert.factors(self._bundle, pair)
            added = dict(zip(arrays.shapes, arrays.arrays(), strict=True))
            self._exchange(backend, {**backend.factors, name: added}, name)

    def remove(self, name: str) -> None:
        """Give new sessions an expert less. Raises as `FusionRuntime.remove_expert`."""
        from fusionroute.runtime.adapters.expert_files import check_removable

        self._shared()  # see `add`
        with self._lock:
            backend = self._shared()
            check_removable(self._bundle, name, self.current.names)
            self._exchange(backend, {other: factors for other, factors in backend.factors.items() if other != name}, name)

    def _exchange(self, backend: SharedBase, factors: Mapping[str, Arrays], changed: str) -> None:
        old = self.current
        names = [name for name in self._bundle.manifest.rows if name in factors]
        system = old.system.with_experts(backend.with_experts(factors), names, changed)
        costs = old.costs and replace(old.costs, experts=old.costs.experts[:1] * len(names))  # one size: one cost
        self._systems.add(system)
        self.current = ExpertSet(system, self._pool(system), costs, old.eos, old.prices)
        old.pool.close()

    def _pool(self, system: LoadedSystem) -> Pool:
        """Room for finished texts, which go where others need their memory."""
        pool = Pool(self._prefixes)
        system.kv_memory.give_back_from(pool)
        return pool

    def close(self) -> None:
        """Release the models; sessions still in use end with ClosedError at their next step."""
        if self.current.system.forked:
            return
        with self._lock:
            for system in self._systems:
                system.close()
            self.current.pool.close()

    def _shared(self) -> SharedBase:
        """The backend, if its experts share one base and may be others. Raises UnavailableError where not, ClosedError."""
        backend = self.current.system.backend
        if isinstance(backend, SharedBase):
            return backend
        if any(variant.pair for variant in self._bundle.manifest.variants):
            raise UnavailableError(
                "A loaded engine keeps its experts: change the bundle with `fusionroute add-expert` or `remove-expert`, and load it again."
            )
        raise UnavailableError("Experts come and go only where all models share one base: export the system with --shared-base.")
