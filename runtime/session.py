"""One text in the making: a committed token list that router and experts share, each model lagging behind it as far as it may."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fusionroute.runtime import limits, prefix
from fusionroute.runtime.backend import NO_IDS, Cache, Fused, FusionInputs, Output
from fusionroute.runtime.background_prefill import CatchUp
from fusionroute.runtime.cancellation import LONG, Watch
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.sampling import Candidates, Sampler, Sampling, SamplingOptions, sampling_of
from fusionroute.runtime.speculation import Rounds
from fusionroute.runtime.text import TextStream, Token

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusionroute.runtime.engine import FusionRuntime

GREEDY = Sampling()


class Session:
    """The stateful form: append, step, rewind. Use one session from one thread at a time."""

    def __init__(self, runtime: FusionRuntime, fusion: str, lam: float, pinned: int | None = None):
        self._runtime = runtime
        self.names, self.unrouted, self.vocab_size = runtime.expert_names, runtime.unrouted, runtime.vocab_size
        self._fusion, self._lam, self._pinned = fusion, lam, pinned
        self.tokens: list[int] = []
        self._router: Cache | None = None
        self._experts: list[Cache | None] = [None] * len(runtime.expert_names)
        self.last: int | None = None  # the expert chosen last
        self.routed: Any = None  # the router's logits of the last plain step, float32 [1, V] until its next pass; None where it did not run
        self.fuse = runtime.backend.fuser()
        self.watch: Watch | None = None  # over the text in the making
        self._newest: Fused | None = None  # what the newest token was chosen from
        self._sampler = Sampler(GREEDY)
        self._text = TextStream(runtime.text)
        self.rounds = Rounds(self, runtime.costs, runtime.vocab_size, runtime.eos) if runtime.costs is not None else None
        self._behind = CatchUp(self, runtime.thread) if runtime.catch_up == "background" else None
        self._prompt = 0  # leading tokens that were there before the first step: every model has read them several at a time, or not yet
        self._lent = threading.Lock()  # held while another session copies what was read of them, and while that is forgotten

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def exact(self) -> bool:
        """Whether no token is read alone."""
        return self._runtime.exact

    @property
    def token_ids(self) -> list[int]:
        """The committed tokens: what was appended and what steps have chosen."""
        return list(self.tokens)

    @property
    def lags(self) -> dict[str, int]:
        """How many committed tokens each expert has not read yet."""
        caches = zip(self._runtime.expert_names, self._experts, strict=True)
        return {name: len(self.tokens) - (cache.length if cache else 0) for name, cache in caches}

    def append(self, ids: Iterable[int]) -> None:
        """Commit tokens without running a model. Raises InputError for ids outside the vocabulary or beyond the context."""
        try:
            new = [index(i) for i in ids]
        except TypeError as error:
            raise InputError("The token ids are not all whole numbers: pass ids as `encode` gives them.") from error
        vocab, capacity = self._runtime.vocab_size, self._runtime.max_seq_len
        if wrong := next((i for i in new if not 0 <= i < vocab), None):
            raise InputError(f"Token id {wrong} is outside the vocabulary: expected 0 to {vocab - 1}.")
        if len(self.tokens) + len(new) > capacity:
            raise InputError(
                f"{len(self.tokens) + len(new)} tokens do not fit the context of {capacity}: shorten the prompt or export with a larger --max-seq-len."
            )
        self.tokens += new
        self._newest = None
        self._text = TextStream(self._runtime.text)

    def rewind(self, n: int) -> None:
        """Keep the first n tokens and forget the rest, in every model."""
        if not 0 <= n <= len(self.tokens):
            raise InputError(f"Cannot rewind to {n} tokens: the session holds {len(self.tokens)}.")
        if self._behind is not None:
            self._behind.settle()
        with self._lent:
            self._prompt = min(self._prompt, n)
        self.keep(n)
        self._newest = None
        self.last = self.last if n else None
        if self.rounds is not None:
            self.rounds.clear()
        self._text = TextStream(self._runtime.text)

    def restart(self, ids: Sequence[int]) -> None:
        """Begin another text in the same buffers, keeping what was read of a prompt that begins alike."""
        read = self.alike(ids) if self._runtime.prefix_cache else 0
        self.rewind(read)
        self.last, self._prompt = None, 0
        self._sampler = Sampler(GREEDY)
        self.append(ids[read:])

    def alike(self, ids: Sequence[int]) -> int:
        """How many leading tokens of a prompt begin this session's prompt too. The last of either are read where they are answered."""
        return limits.even(prefix.common(self.tokens, ids, min(self._prompt - 1, len(ids) - 2)))

    def offer(self, model: int | None, ids: Sequence[int]) -> int:
        """How many leading tokens of a text a model (None: the router) has read here, in a form that can be lent."""
        cache = self._router if model is None else self._experts[model]
        return limits.even(min(self.alike(ids), cache.length)) if cache is not None else 0

    def lend(self, model: int | None, ids: Sequence[int], cache: Cache) -> None:
        """Let another session's cache of a model take over what `offer` says."""
        with self._lent:
            own, length = self._router if model is None else self._experts[model], self.offer(model, ids)
            if own is not None and length:
                cache.copy_prefix(own, length)

    def step(self, *, fusion: str | None = None, lam: float | None = None, **sampling: Unpack[SamplingOptions]) -> Token:
        """Choose, append and return the next token. Sampling arguments are those of `Sampling`; equal ones continue one random stream.

        Raises InputError for an empty session or a full context, ClosedError after the runtime was closed.
        """
        token = self.advance(*self._settings(fusion, lam, sampling), self._pinned)
        token.text = "".join(ready.text for ready in self._text.push(token))
        return token

    def steps(self, most: int, *, fusion: str | None = None, lam: float | None = None, **sampling: Unpack[SamplingOptions]) -> list[Token]:
        """Like `step`, but with speculation one to `most` tokens: as many as one round gives."""
        if most < 1:
            raise InputError(f"most={most} is out of range: expected at least 1.")
        tokens = self.advance_some(*self._settings(fusion, lam, sampling), self._pinned, most)
        for token in tokens:
            token.text = "".join(ready.text for ready in self._text.push(token))
        return tokens

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """The fused logits that the newest token was chosen from, float32 [V], after the penalty and before the temperature.

        They are handed over, not copied (from the CPU; from a device they are copied to the host once): the array is the caller's for good,
        unchanged by later steps and by `close`. Raises InputError where no step came last.
        """
        if self._newest is None:
            raise InputError("There are no logits: call `step` first, and read them before `append` or `rewind`.")
        return self.fuse.row(self._newest)

    def _settings(self, fusion: str | None, lam: float | None, sampling: SamplingOptions) -> tuple[Sampler, tuple[float, float]]:
        """The sampler and the weights of a step."""
        if sampling or self._sampler.sampling != GREEDY:
            wanted = sampling_of(sampling)
            if wanted != self._sampler.sampling:
                self._sampler = Sampler(wanted)
        return self._sampler, self._runtime.coefficients(fusion or self._fusion, self._lam if lam is None else lam)

    def advance(self, sampler: Sampler, coefficients: tuple[float, float], pinned: int | None = None) -> Token:
        """One step with a given sampler: router, the expert it chooses (or the pinned one), fusion, choice. The token's text is left empty.

        A model that has nothing to say does not run: an expert whose logits have weight zero, and the router where neither its
        logits nor its choice count; routing is then NaN.
        """
        runtime = self._runtime
        if not self.tokens:
            raise InputError("The session holds no tokens: append a prompt of at least one token first.")
        self._prompt = self._prompt or len(self.tokens)
        if len(self.tokens) >= runtime.max_seq_len:
            raise InputError(f"The context of {runtime.max_seq_len} tokens is full: rewind, or export with a larger --max-seq-len.")

        def fused_with(expert: int) -> tuple[Output, Output, Fused]:
            answered = self.read(expert, newest) if routed is None or coefficients[1] else routed
            router = routed or answered  # a stand-in, read with weight zero
            return router, answered, self.fused(router.logits, answered.logits, coefficients, sampler, len(self.tokens))

        newest = (len(self.tokens) - 1,)
        routed = self.read(None, newest) if pinned is None or coefficients[0] else None
        self.routed = None if routed is None else routed.logits
        guess = self._guess() if pinned is None and coefficients[1] else pinned
        found = fused_with(guess) if guess is not None else None  # queued behind the router, which may still run
        routing = (runtime.unrouted if routed is None or routed.routing is None else routed.routing[0]).copy()
        choice = int(routing.argmax()) if pinned is None else pinned
        if choice != guess:
            self._take_back(guess)
            found = None
        router, answered, fused = found or fused_with(choice)
        self.last = choice
        chosen = sampler.choose(Candidates(fused.ids[0], fused.logits[0], float(fused.sampling_normaliser[0])), lambda: fused.rows[0])
        logprob = self.logprob(chosen, fused, router.logits, answered.logits, coefficients)
        self.tokens.append(chosen)
        self._go_on()
        return Token(chosen, runtime.expert_names[choice], logprob, routing)

    def _go_on(self) -> None:
        """Tokens were committed: what they are is settled until a rewind."""
        if self._behind is not None:
            self._behind.go_on(len(self.tokens))

    def advance_some(self, sampler: Sampler, coefficients: tuple[float, float], pinned: int | None, most: int) -> list[Token]:
        """One step, or with speculation as many tokens as one round gives, at most `most`."""
        most = min(most, self._runtime.max_seq_len - len(self.tokens))
        if self.rounds is None or not self.tokens or most < 2:
            return [self.advance(sampler, coefficients, pinned)]
        self._prompt = self._prompt or len(self.tokens)
        return self.rounds.advance(sampler, coefficients, pinned, most)

    def _guess(self) -> int | None:
        """The expert to run before the routing is known, where models run side by side: the last one, if it has read all but one token."""
        cache = None if self.last is None else self._experts[self.last]
        active = cache is not None and cache.length >= len(self.tokens) - 1
        return self.last if active and self._runtime.backend.async_dispatch else None

    def _take_back(self, guess: int | None) -> None:
        """Forget what a wrongly guessed expert has read: what each expert reads, and in which chunks, must not depend on guesses."""
        cache = None if guess is None else self._experts[guess]
        if cache is not None:
            cache.length = len(self.tokens) - 1

    def fused(
        self, router: Any, expert: Any, coefficients: tuple[float, float], sampler: Sampler, length: int, single: bool = False
    ) -> Fused:
        """Fusion of logits float32 [1, V] at one position, whose text so far are the first `length` tokens.

        `single`: with one candidate, not as many as the sampler wants.
        """
        settings = sampler.sampling
        penalised = np.unique(np.asarray(self.tokens[:length], np.int64)) if settings.repetition_penalty != 1.0 else NO_IDS
        wanted, temperature = 1 if single else sampler.wanted(self._runtime.vocab_size), settings.temperature or 1.0
        self._newest = self.fuse(FusionInputs(router, expert, coefficients, wanted, penalised, settings.repetition_penalty, temperature))
        return self._newest

    def read(self, expert: int | None, positions: Sequence[int]) -> Output:
        """Bring a model (None: the router) up to the last of some ascending positions close together; its output at each of them.

        What it has read behind the first of them is read again.
        """
        if expert is not None and self._behind is not None:
            self._behind.wait(expert)
        cache = self._cache(expert)
        self._borrow(expert, cache)
        cache.length, end = min(cache.length, positions[0]), positions[-1] + 1
        while (stop := self._stop(expert, cache.length, positions[0], end)) < end:
            self.forward(expert, self.tokens[cache.length : stop], (stop - cache.length - 1,))
        start = cache.length
        return self.forward(expert, self.tokens[start:end], [position - start for position in positions])

    def _stop(self, expert: int | None, start: int, first: int, end: int) -> int:
        """Where the next pass of those that read from `start` to `end` ends, of which the last one answers, from position `first` on.

        No pass but a decode step reads a single token, and only the last one an odd number: see `prefix`.
        """
        if expert is None or self._behind is None:
            chunk = min(limits.CHUNK, self._runtime.backend.prefill_chunk)
            stop = min(start + chunk, first)
            stop -= 2 * (end - stop == 1)
            return end if end - start <= chunk else max(stop - (stop - start) % 2, start + 1)
        stop = limits.boundary(start)
        return stop if stop < first else end

    def read_piece(self, expert: int, limit: int) -> None:
        """Let an expert read one piece of the tokens before `limit`, where one is due (see `CatchUp`)."""
        cache = self._cache(expert)
        self._borrow(expert, cache)
        if (stop := limits.boundary(cache.length)) <= limit:
            cache.forward(self.tokens[cache.length : stop], (stop - cache.length - 1,))

    def reached(self, expert: int) -> int:
        """How many tokens an expert has read."""
        cache = self._experts[expert]
        return cache.length if cache is not None else 0

    def _borrow(self, model: int | None, cache: Cache) -> None:
        """Take over what other sessions have read of this text, before a model reads its first token."""
        if self._runtime.prefix_cache and not cache.length:
            prefix.fill(self, model, cache, self._runtime.pool.sessions())

    def forward(self, expert: int | None, ids: Sequence[int], positions: Sequence[int]) -> Output:
        """Let a model (None: the router) read the next tokens; its output at some of their places."""
        cache = self._cache(expert)
        if not self._runtime.exact:
            return self._run(cache, ids, positions)
        # Products take rows by twos; a last one alone has a kernel of its own, which rounds differently: none is read or answered alone.
        surplus = 0
        if len(ids) % 2 and cache.length:
            cache.length -= 1
            ids, positions = (self.tokens[cache.length], *ids), [position + 1 for position in positions]
        elif len(ids) % 2 and len(ids) < self._runtime.max_seq_len:
            ids, surplus = (*ids, ids[-1]), 1
        alone = len(positions) % 2
        answer = self._run(cache, ids, (positions[0], *positions) if alone else positions)
        cache.length -= surplus
        if not alone:
            return answer
        return Output(answer.logits[1:], None if answer.routing is None else answer.routing[1:])

    def _run(self, cache: Cache, ids: Sequence[int], positions: Sequence[int]) -> Output:
        """A forward pass. A long one can be interrupted on its way: what it has written lies beyond the cache's length."""
        if self.watch is None or not self.watch.armed or len(ids) <= LONG:
            return cache.forward(ids, positions)
        self.watch.check()
        with self.watch.over(cache.interrupt):
            return cache.forward(ids, positions)

    def commit(self, token: Token) -> None:
        """Append a token that was verified."""
        self.tokens.append(token.id)
        self.last = self.names.index(token.expert)
        self._go_on()

    def keep(self, n: int) -> None:
        """Keep the first n tokens, here and in every model."""
        del self.tokens[n:]
        for cache in (self._router, *self._experts):
            if cache is not None and cache.length > n:
                cache.length = n

    def _cache(self, expert: int | None) -> Cache:
        """The cache of the router (None) or of an expert, made at first use: an expert that is never chosen costs nothing."""
        backend = self._runtime.backend
        if expert is None:
            self._router = self._router or backend.router.cache()
            return self._router
        cache = self._experts[expert] = self._experts[expert] or backend.experts[expert].cache()
        return cache

    def reset(self) -> None:
        """Forget what was read of the tokens, which stay."""
        if self._behind is not None:
            self._behind.settle()
        with self._lent:
            self._prompt = 0
        for cache in (self._router, *self._experts):
            if cache is not None:
                cache.length = 0

    def pause(self) -> None:
        """The text is over: nothing more of it is read in the background."""
        if self._behind is not None:
            self._behind.pause()

    def clear(self) -> None:
        """Forget all tokens but keep the buffers."""
        self.rewind(0)
        self._sampler = Sampler(GREEDY)

    def logprob(self, chosen: int, fused: Fused, router: Any, expert: Any, coefficients: tuple[float, float]) -> float:
        """Log-probability of the chosen token in the fused distribution at temperature 1, without penalty. Logits are float32 [1, V]."""
        place = np.flatnonzero(fused.ids[0] == chosen)
        if len(place):
            raw = float(fused.unpenalised[0, place[0]])
        else:  # chosen from beyond the candidates
            raw = sum(weight * float(logits[0, chosen]) for weight, logits in zip(coefficients, (router, expert), strict=True) if weight)
        return raw - float(fused.log_normaliser[0])
