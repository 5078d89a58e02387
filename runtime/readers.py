"""Tokens into caches: how the router and the experts of one session read its tokens, each as far as it was asked to."""

from __future__ import annotations

from collections.abc import Sequence

from fusionroute.runtime import limits
from fusionroute.runtime.backend import Output
from fusionroute.runtime.background_prefill import BackgroundPrefill
from fusionroute.runtime.even_cache import evenly, evenly_together
from fusionroute.runtime.loaded_system import LoadedSystem
from fusionroute.runtime.reader import Reader
from fusionroute.runtime.token_sequence import TokenSequence


class Readers:
    """The router and the experts of one session, in the order of the routing head's rows."""

    def __init__(self, system: LoadedSystem, sequence: TokenSequence):
        self.sequence = sequence
        self.router = Reader(system, sequence, None)
        self.experts = [Reader(system, sequence, expert) for expert in range(len(system.expert_names))]
        self._background = BackgroundPrefill(self.experts, system.thread) if system.background_prefill else None
        forward_both = system.backend.forward_both
        self._apart = system.backend.apart
        self._forward_both = evenly(forward_both) if forward_both is not None and system.exact else forward_both
        together = system.backend.forward_together
        self._forward_together = evenly_together(together) if together is not None and system.exact else together
        self.asked: int | None = None  # the expert that was asked to read last

    @property
    def joint(self) -> bool:
        """Whether the router and an expert can read in one pass."""
        return self._forward_both is not None

    def read(
        self, positions: Sequence[int] | None, expert: int | None, expert_positions: Sequence[int]
    ) -> tuple[Output | None, Output | None]:
        """`Reader.read` of the router and of an expert, in common passes where the backend has them.

        `positions` None: the router does not read; `expert` None: no expert does.
        """
        self.asked = expert
        if positions is None or expert is None or self._forward_both is None or expert in self._apart:
            routed = None if positions is None else self.router.read(positions)
            return routed, None if expert is None else self.read_expert(expert, expert_positions)
        self._take(expert)
        own, other = self.router.passes(positions), self.experts[expert].passes(expert_positions)
        for segment in own[: -len(other)]:  # the last passes coincide
            self.router.forward(*segment)
        for segment in other[: -len(own)]:
            self.experts[expert].forward(*segment)
        caches = self.router.cache, self.experts[expert].cache
        for ahead, behind in zip(own[-len(other) :], other[-len(own) :], strict=True):
            with self.sequence.watching(len(ahead.ids) + len(behind.ids), caches[0].interrupt):
                outputs = self._forward_both(caches[0], ahead, caches[1], behind)
        return outputs

    def read_together(self, positions: Sequence[int], experts: Sequence[int]) -> tuple[Output, dict[int, Output]]:
        """`Reader.read` of the router and some experts, in ascending order. The outputs of experts by their numbers."""
        assert self._forward_together is not None
        self.asked = None
        parts = []
        for reader in (self.router, *(self.experts[expert] for expert in experts)):
            *leading, last = reader.passes(positions)
            for segment in leading:
                reader.forward(*segment)
            parts.append((reader.cache, last))
        with self.sequence.watching(sum(len(segment.ids) for _, segment in parts), parts[0][0].interrupt):
            routed, *answers = self._forward_together(parts)
        return routed, dict(zip(experts, answers, strict=True))

    def read_expert(self, expert: int, positions: Sequence[int]) -> Output:
        """`Reader.read` of an expert, which first ends the pass that it may be in."""
        self.asked = expert
        self._take(expert)
        return self.experts[expert].read(positions)

    def _take(self, expert: int) -> None:
        """End the background pass that an expert may be in."""
        if self._background is not None:
            self._background.wait(expert)

    def commit(self, token: int) -> None:
        """Append a token that stays until a rewind."""
        self.sequence.ids.append(token)
        if self._background is not None:
            self._background.resume(len(self.sequence.ids))

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens, here and in every model."""
        self.sequence.truncate(length)
        self.router.truncate(length)
        for expert in self.experts:
            expert.truncate(length)

    def rewind(self, length: int) -> None:
        """`truncate` for a text that may be lent, and read in the background."""
        self._take_over(length)
        self.truncate(length)

    def forget(self) -> None:
        """Forget what was read of the tokens, which stay."""
        self._take_over(0)
        for reader in (self.router, *self.experts):
            reader.truncate(0)

    def discard(self, model: int | None) -> None:
        """Drop the cache of a model: 0 for the router, then the experts; None: of all."""
        self._take_over(0)
        for reader in (self.router, *self.experts) if model is None else ((self.router, *self.experts)[model],):
            reader.discard()

    def _take_over(self, length: int) -> None:
        """Nobody reads or copies what is behind the first `length` tokens any more."""
        self.settle()
        self.sequence.limit_prompt(length)

    def read_ahead(self, experts: Sequence[int]) -> None:
        """Let the router and some experts read the text, but for the tokens that belong to the pass that answers behind it.

        As of a lent prefix, an even number is read. Raises as `Reader.read`.
        """
        self.settle()
        self.sequence.start_decoding()
        end = limits.even(max(len(self.sequence.ids) - 2, 0))
        behind = [number for number in experts if end - self.experts[number].length > 1]  # a single token is never read alone
        if end - self.router.length > 1:
            self.read((end - 1,), behind.pop(0) if behind and self.joint else None, (end - 1,))
        for number in behind:
            self.read_expert(number, (end - 1,))

    def settle(self) -> None:
        """Wait for what is read in the background."""
        if self._background is not None:
            self._background.settle()

    def start_lending(self) -> None:
        """Let other sessions copy what was read of the prompt, by other means than passes."""
        for reader in (self.router, *self.experts):
            reader.start_lending()

    def pause(self) -> None:
        """Read nothing more in the background until the next token is committed."""
        if self._background is not None:
            self._background.pause()
