"""One text in the making: its tokens, the models that read them, and the steps that add to them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fusionroute.runtime.arguments import shown, token_ids, whole
from fusionroute.runtime.errors import ClosedError, FusionError, InputError, NumericalError, UnavailableError, one_line
from fusionroute.runtime.loaded_system import LoadedSystem
from fusionroute.runtime.plain_step import PlainStep
from fusionroute.runtime.readers import Readers
from fusionroute.runtime.sampling import Sampler
from fusionroute.runtime.scoring import Scores, score_last
from fusionroute.runtime.text import Token
from fusionroute.runtime.token_sequence import TokenSequence

if TYPE_CHECKING:
    from fusionroute.runtime.read_along import PassPrices
    from fusionroute.runtime.speculation.costs import Costs
    from fusionroute.runtime.speculation.rounds import Rounds

LOG = logging.getLogger("fusionroute")


class Decoder:
    """What a session and a stream drive. Its buffers serve one text after another."""

    def __init__(self, system: LoadedSystem, costs: Costs | None, eos: frozenset[int], prices: PassPrices | None = None):
        """`costs` None: without speculation. `prices`: see `ReadAlong`. Raises ClosedError once the system is closed, and in a forked process."""
        _ = system.backend  # says so before a lock is taken: a thread that stayed behind a fork may hold it forever
        self.system, self.eos, self.vocab_size = system, eos, system.vocab_size
        self.sequence = TokenSequence()
        self.readers = Readers(system, self.sequence)
        self.step = PlainStep(system, self.readers, prices)
        self.rounds: Rounds | None = None
        if costs is not None:
            from fusionroute.runtime.speculation.rounds import Rounds  # here: see `FusionRuntime._speculation_costs`

            self.rounds = Rounds(self.step, costs, eos, system.exact)

    def append(self, ids: Iterable[int]) -> None:
        """Commit tokens without running a model.

        Raises InputError for ids outside the vocabulary or beyond the context.
        """
        self.system.check_process()
        new = token_ids(ids)
        vocab, capacity = self.system.vocab_size, self.system.max_seq_len
        if wrong := next((i for i in new if not 0 <= i < vocab), None):
            raise InputError(f"Token id {shown(wrong)} is outside the vocabulary: expected 0 to {vocab - 1}.")
        total = len(self.sequence.ids) + len(new)
        if total > capacity:
            raise InputError(
                f"{total} tokens do not fit the context of {capacity}: shorten the prompt or export with a larger --max-seq-len."
            )
        self.sequence.append(new)
        self.step.newest = None

    def rewind(self, length: int) -> None:
        """Keep the first `length` tokens and forget the rest, in every model. Raises InputError if there are fewer."""
        self.system.check_process()
        length = whole("The number of tokens to keep", length)
        if not 0 <= length <= len(self.sequence.ids):
            raise InputError(f"Cannot rewind to {shown(length)} tokens: the session holds {len(self.sequence.ids)}.")
        self.readers.rewind(length)
        self.step.restart()
        self.step.newest = None
        self.step.failed.clear()
        if not length:
            self.step.guesses.last = None
        if self.rounds is not None:
            self.rounds.clear()

    def read_ahead(self, experts: Sequence[int]) -> None:
        """Let the router and experts read the text, see `Readers.read_ahead`. Raises as `advance`, but for no text."""
        self.system.check_process()
        self.step.newest = None
        self.readers.read_ahead(experts)

    def restart(self, ids: Sequence[int]) -> None:
        """Begin another text, keeping what was read of a prompt that begins alike.

        Raises InputError as `append` does.
        """
        shared = self.shared_prefix(ids) if self.system.prefixes is not None else 0
        self.rewind(shared)
        self.step.guesses.last, self.sequence.prompt_length = None, 0
        self.append(ids[shared:])

    def shared_prefix(self, ids: Sequence[int]) -> int:
        """How many leading tokens of a prompt need not be read again here."""
        return self.sequence.shared_prefix(ids)

    def advance(self, sampler: Sampler, coefficients: tuple[float, float], pinned: int | None = None) -> Token:
        """Choose and commit the next token, see `PlainStep`.

        Raises InputError for an empty text or a full context, ClosedError, NumericalError, and FusionError where the
        device fails: the text is as it was then.
        """
        length, capacity = len(self.sequence.ids), self.system.max_seq_len
        if not length:
            raise InputError("The session holds no tokens: append a prompt of at least one token first.")
        if length >= capacity:
            raise InputError(f"The context of {capacity} tokens is full: rewind, or export with a larger --max-seq-len.")
        self.sequence.start_decoding()
        try:
            return self.step.advance(sampler, coefficients, pinned)
        except FusionError as error:
            self._let_router_answer(error)
            return self.advance(sampler, coefficients, pinned)

    def advance_some(self, sampler: Sampler, coefficients: tuple[float, float], pinned: int | None, most: int) -> list[Token]:
        """One step; with speculation the tokens of one round, at most `most`. Raises as `advance` does."""
        most = min(most, self.system.max_seq_len - len(self.sequence.ids))
        if self.rounds is None or not self.sequence.ids or most < 2:
            return [self.advance(sampler, coefficients, pinned)]
        self.sequence.start_decoding()
        try:
            return self.rounds.advance(sampler, coefficients, pinned, most)
        except FusionError as error:
            self._let_router_answer(error)
            return [self.advance(sampler, coefficients, pinned)]

    def score(self, ids: Iterable[int], coefficients: tuple[float, float], pinned: int | None) -> Scores:
        """Append tokens, and judge each of them, see `score_last`.

        Raises InputError as `append` does, and for an empty text; NumericalError and ClosedError: the text is as it was
        then.
        """
        length = len(self.sequence.ids)
        if not length:
            raise InputError("The session holds no tokens: append a prompt of at least one token first.")
        self.sequence.start_decoding()
        self.append(ids)
        count = len(self.sequence.ids) - length
        try:
            return score_last(self.readers, self.step.fuser, self.step.numerics, self.step.vocab_size, count, coefficients, pinned)
        except BaseException as error:
            self.rewind(length)
            if isinstance(error, NumericalError):
                self.discard(error)
            raise

    def discard(self, error: NumericalError) -> int | None:
        """Forget what the model at fault has read, which may not be finite: its number, 0 for the router; None: all."""
        names = self.system.router_name, *self.system.expert_names
        model = None if error.model is None else names.index(error.model)
        self.readers.discard(model)
        return model

    def _let_router_answer(self, error: FusionError) -> None:
        """Let the router answer for the expert that failed, until a rewind. Raises the error where it may not."""
        self.step.newest = None
        expert = self.readers.asked
        if isinstance(error, NumericalError) and (model := self.discard(error)) is not None:
            expert = model - 1 if model else None
        allowed = self.system.router_may_answer and not isinstance(error, (ClosedError, InputError, UnavailableError))
        if not allowed or expert is None or expert in self.step.failed:
            raise error
        self.step.failed.add(expert)
        LOG.warning("%s failed, and the router answers alone: %s", self.system.expert_names[expert], one_line(error))

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """The fused row [V] that the newest token was chosen from, see `Session.logits`.

        Raises InputError without one.
        """
        if self.step.newest is None:
            raise InputError("There are no logits: call `step` first, and read them before `append` or `rewind`.")
        return self.step.newest_row()

    @property
    def drafted(self) -> int:
        """Tokens that speculation guessed in this text."""
        return self.rounds.drafted if self.rounds is not None else 0

    @property
    def accepted(self) -> int:
        """How many of the drafted tokens held."""
        return self.rounds.accepted if self.rounds is not None else 0
