"""The runtime's public face: load a bundle, then generate, stream, score, or drive a session by hand."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusionroute.runtime.backends import Backend, open_backend
from fusionroute.runtime.background_prefill import MODES
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.cancellation import Interrupted, Watch
from fusionroute.runtime.chat import render
from fusionroute.runtime.errors import ClosedError, InputError, UnavailableError
from fusionroute.runtime.limits import CHUNK
from fusionroute.runtime.pool import Pool
from fusionroute.runtime.sampling import Sampler, SamplingOptions, sampling_of
from fusionroute.runtime.scoring import Scores, score
from fusionroute.runtime.session import Session
from fusionroute.runtime.speculation import MOST, Costs, costs_of
from fusionroute.runtime.stream import End, Result, Stream
from fusionroute.runtime.text import Text, TextStream, Token

if TYPE_CHECKING:
    from typing_extensions import Unpack

Prompt = str | Sequence[int] | Sequence[dict[str, str]]
DEFAULT_NEW_TOKENS = 128
FUSIONS = ("weighted", "additive")
SPECULATION = ("off", "auto")


class Options(NamedTuple):
    """What backends read of the options of `FusionRuntime.load`."""

    precision: str | None
    device: str
    threads: int | None
    expert_memory: int | None
    share_weights: bool


class StreamOptions(SamplingOptions, total=False):
    """The options of `FusionRuntime.stream`, which `generate` passes on."""

    stop: str | Sequence[str] | None
    fusion: str | None
    lam: float | None
    expert: str | None
    cancel: threading.Event | None
    deadline: float | None


class FusionRuntime:
    """A loaded FusionRoute system. Thread safe: several threads may generate at once, each through a session of its own."""

    def __init__(
        self,
        bundle: Bundle,
        precision: str | None,
        device: str,
        fusion: str | None,
        lam: float | None,
        threads: int | None,
        expert_memory: int | None = None,
        speculation: str = "off",
        exact: bool = False,
        catch_up: str = "lazy",
        prefix_cache: int = 1,
        share_weights: bool = False,
    ):
        manifest = bundle.manifest
        self.bundle = bundle
        self._backend: Backend | None
        self._backend, self.precision = open_backend(bundle, Options(precision, device, threads, expert_memory, share_weights))
        self.exact = exact
        self.catch_up, self.prefix_cache = catch_up, prefix_cache
        threaded = catch_up == "background" and not self._backend.async_dispatch
        self.thread = ThreadPoolExecutor(1, "fusionroute-catch-up") if threaded else None  # it starts with its first work
        self.costs: Costs | None = None  # of speculation, where it is on
        if speculation == "auto":
            self.costs = costs_of(bundle, self._backend, self.precision, threads)
        self.expert_names: list[str] = manifest.experts
        self.vocab_size, self.max_seq_len = manifest.vocab_size, manifest.max_seq_len
        self.fusion: str = fusion or manifest.fusion
        self.lam = manifest.lam if lam is None else lam
        self.coefficients(self.fusion, self.lam)
        self.text = Text.load(bundle.folder / "tokenizer.json") if "tokenizer.json" in manifest.files else None
        self.unrouted = np.full(len(self.expert_names), np.nan, np.float32)  # the routing of tokens that no router was asked for
        self.unrouted.flags.writeable = False
        self._template = bundle.text("chat_template.jinja")
        self.eos = frozenset(manifest.eos_token_ids)
        self.pool = Pool(prefix_cache)
        self._process = os.getpid()

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        precision: str | None = None,
        device: str = "auto",
        *,
        fusion: str | None = None,
        lam: float | None = None,
        catch_up: str = "lazy",
        speculation: str = "off",
        exact: bool = False,
        threads: int | None = None,
        expert_memory: int | None = None,
        prefix_cache: int = 1,
        share_weights: bool = False,
        verify: bool = False,
    ) -> FusionRuntime:
        """Open a bundle. `precision` defaults to the fastest it holds; `fusion` and `lam` to what was exported; `verify` hashes every file.

        `speculation="auto"` guesses ahead where that pays on this machine: greedy output is the same in fp32, sampling keeps its distribution.
        Quantised models round a single token differently from several; with `exact` they are read by twos, and greedy output is the same
        with speculation and without.

        `catch_up="background"`: experts read the text while others answer, so that an expert that wakes late answers at once; it takes
        their time and memory whether they wake or not.

        `prefix_cache`: finished texts whose keys and values are kept for prompts that begin alike, beside those that were generated at once;
        what is in use is shared too. 0: every prompt is read from its beginning.

        `expert_memory`, bytes: on TensorRT devices, weights of experts beyond it wait in host memory until they are chosen.

        `share_weights`: processes that load the same bundle on the CPU share its weights in memory: packed once, in the user's cache folder,
        some 2.3 times their size. By default each process packs a copy of its own in memory.

        Raises FusionError subclasses only: BundleError, UnavailableError, InputError.
        """
        if catch_up not in MODES:
            raise InputError(f"Unknown catch_up '{catch_up}': use 'lazy' or 'background'.")
        if catch_up == "background" and expert_memory is not None:
            raise InputError("catch_up='background' would move all experts' weights in turn, which expert_memory limits: use 'lazy'.")
        if prefix_cache < 0:
            raise InputError(f"prefix_cache={prefix_cache} is out of range: expected the number of texts to keep, or 0 for none.")
        if speculation not in SPECULATION:
            raise InputError(f"Unknown speculation '{speculation}': use 'off' or 'auto'.")
        if threads is not None and threads < 1:
            raise InputError(f"threads={threads} is out of range: expected at least 1, or None for all cores.")
        opened = Bundle.open(bundle)
        if verify:
            opened.verify()
        return cls(
            opened, precision, device, fusion, lam, threads, expert_memory, speculation, exact, catch_up, prefix_cache, share_weights
        )

    # -- text ---------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids as the bundle's tokenizer.json makes them, with its BOS."""
        return self._tokenizer().encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._tokenizer().decode(list(ids))

    def _tokenizer(self) -> Text:
        if self.text is None:
            raise UnavailableError(f"The bundle {self.bundle.folder} has no tokenizer.json: pass token ids instead of text.")
        return self.text

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: a str (no template), a list of ids, or a list of {"role", "content"} messages (chat template)."""
        if isinstance(prompt, str):
            return self.encode(prompt)
        items: list[Any] = list(prompt)
        if items and all(isinstance(item, dict) for item in items):
            if self._template is None:
                raise UnavailableError(f"The bundle {self.bundle.folder} has no chat_template.jinja: pass text or token ids.")
            manifest = self.bundle.manifest
            text = render(self._template, items, bos_token=manifest.bos_token or "", eos_token=manifest.eos_token or "")
            return self._tokenizer().encode(text, special=False)
        if not all(isinstance(item, (int, np.integer)) for item in items):
            raise InputError("A prompt must be a str, a list of token ids, or a list of {'role', 'content'} messages.")
        return items

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        *,
        on_token: Callable[[Token], Any] | None = None,
        **options: Unpack[StreamOptions],
    ) -> Result:
        """Generate to the end; options are those of `stream`.

        `on_token` is called in this thread with every token as it becomes certain. Where it returns False the text ends there, as
        "cancelled"; what it raises is raised here.
        """
        tokens: list[Token] = []
        with closing(self.stream(prompt, max_new_tokens, **options)) as stream:
            for token in stream:
                tokens.append(token)
                if on_token is not None and on_token(token) is False:
                    break
        return Result(
            text="".join(token.text for token in tokens),
            token_ids=[token.id for token in tokens],
            experts=[token.expert for token in tokens],
            logprobs=[token.logprob for token in tokens],
            finish_reason=stream.finish_reason or "cancelled",
            drafted=stream.drafted,
            accepted=stream.accepted,
        )

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        *,
        stop: str | Sequence[str] | None = None,
        fusion: str | None = None,
        lam: float | None = None,
        expert: str | None = None,
        cancel: threading.Event | None = None,
        deadline: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream:
        """Generate token by token. `sampling` are the fields of `Sampling` (greedy by default).

        `cancel`, once another thread sets it, and `deadline`, seconds from this call, end the text within a token, also while the prompt is
        read; `finish_reason` is then "cancelled" or "deadline", and the tokens so far stand.

        `expert` answers every token instead of the routed one. With it and `lam=0` the router does not run, and every `routing` is
        NaN [n_experts]; with `lam=1` no expert runs.
        Arguments are checked here, before the first token is asked for. Raises InputError, UnavailableError, ClosedError.
        """
        _ = self.backend  # closed runtimes say so first
        watch = Watch(cancel, deadline)
        ids = self.prompt_ids(prompt)
        if not ids:
            raise InputError("The prompt is empty: it needs at least one token.")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens} is out of range: expected at least 1.")
        if len(ids) >= self.max_seq_len:
            raise InputError(
                f"The prompt has {len(ids)} tokens, which leaves no room in the context of {self.max_seq_len}: "
                "shorten it or export with a larger --max-seq-len."
            )
        sampler = Sampler(sampling_of(sampling))
        coefficients = self.coefficients(fusion or self.fusion, self.lam if lam is None else lam)
        pinned = self._pinned(expert)
        text = TextStream(self.text, () if stop is None else stop)
        session = self._take(ids)
        try:
            session.restart(ids)
        except InputError:
            self._give(session)
            raise
        return Stream(self._tokens(session, sampler, coefficients, pinned, text, max_new_tokens, watch))

    def _tokens(
        self,
        session: Session,
        sampler: Sampler,
        coefficients: tuple[float, float],
        pinned: int | None,
        text: TextStream,
        limit: int,
        watch: Watch,
    ) -> Iterator[Token | End]:
        """Tokens, then the reason why they ended."""
        session.watch = watch
        try:
            reason = "length"
            ready: deque[Token] = deque()
            whole = sampler.sampling.temperature > 0  # rounds that the limit cuts short would draw other random numbers
            try:
                for left in range(min(limit, self.max_seq_len - len(session)), 0, -1):
                    watch.check()
                    if not ready:
                        ready.extend(session.advance_some(sampler, coefficients, pinned, MOST if whole else left))
                    token = ready.popleft()
                    if token.id in self.eos:
                        reason = "stop"
                        break
                    yield from text.push(token)
                    if text.stopped:
                        break
            except Interrupted:
                reason = watch.reason or "cancelled"
            yield from text.finish()
            rounds = session.rounds
            yield End("stop" if text.stopped else reason, rounds.drafted if rounds else 0, rounds.accepted if rounds else 0)
        finally:
            self._give(session)

    def score(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int] | None = None,
        *,
        chunk: int = CHUNK,
        fusion: str | None = None,
        lam: float | None = None,
    ) -> Scores:
        """Teacher-forced fused logits. `positions` limits (and orders) the rows; `chunk=1` reads as one-token decoding does.

        Raises InputError for ids outside the vocabulary, more tokens than the context, or positions outside the tokens.
        """
        _ = self.backend
        asked = range(len(token_ids)) if positions is None else [int(p) for p in positions]
        if not len(token_ids):
            raise InputError("There is nothing to score: expected at least one token id.")
        if wrong := [p for p in asked if not 0 <= p < len(token_ids)]:
            raise InputError(f"Position {wrong[0]} is outside the {len(token_ids)} tokens: expected 0 to {len(token_ids) - 1}.")
        if chunk < 1:
            raise InputError(f"chunk={chunk} is out of range: expected at least 1.")
        ordered = sorted(set(asked))
        session = self._take(())
        try:
            session.clear()
            session.append(token_ids)
            scores = score(session, ordered, chunk, self.coefficients(fusion or self.fusion, self.lam if lam is None else lam))
        finally:
            self._give(session)
        if list(asked) == ordered:
            return scores
        rows = np.searchsorted(ordered, asked)
        return Scores(scores.logits[rows], scores.experts[rows], scores.routing[rows])

    def session(self, fusion: str | None = None, lam: float | None = None, expert: str | None = None) -> Session:
        """A new empty session with its own KV caches; `expert`, where given, answers every token instead of the routed one."""
        chosen, weight = fusion or self.fusion, self.lam if lam is None else lam
        self.coefficients(chosen, weight)
        return self.pool.add(Session(self, chosen, weight, self._pinned(expert)))

    def _pinned(self, expert: str | None) -> int | None:
        """The index of a named expert. Raises InputError for a name that the bundle does not have."""
        if expert is None:
            return None
        if expert not in self.expert_names:
            raise InputError(f"Unknown expert '{expert}': use one of {', '.join(self.expert_names)}.")
        return self.expert_names.index(expert)

    @staticmethod
    def coefficients(fusion: str, lam: float) -> tuple[float, float]:
        """Weights of router and expert logits: (λ, 1 − λ) for `weighted`, (1, 1) for `additive`. Raises InputError."""
        if fusion not in FUSIONS:
            raise InputError(f"Unknown fusion '{fusion}': use 'weighted' or 'additive'.")
        if not 0.0 <= lam <= 1.0:
            raise InputError(f"lam={lam} is out of range: expected a number from 0 (expert only) to 1 (router only).")
        return (lam, 1.0 - lam) if fusion == "weighted" else (1.0, 1.0)

    # -- life ---------------------------------------------------------------------------------------------------------

    def _take(self, ids: Sequence[int]) -> Session:
        return self.pool.take(ids, lambda: Session(self, self.fusion, self.lam))

    def _give(self, session: Session) -> None:
        session.watch = None
        session.pause()
        if not self._forked:
            self.pool.give(session)

    @property
    def _forked(self) -> bool:
        """Whether this is another process, where threads of the old one may have left the lock locked."""
        return os.getpid() != self._process

    @property
    def backend(self) -> Backend:
        """The loaded models. Raises ClosedError after `close`, and in another process than the one that loaded them."""
        if self._forked:
            raise ClosedError("The runtime was loaded before this process was forked and its threads stayed behind: load the bundle here.")
        backend = self._backend
        if backend is None:
            raise ClosedError("The runtime was closed: load the bundle again.")
        return backend

    def close(self) -> None:
        """Release models and buffers; sessions still in use, in any thread, end with ClosedError at their next step."""
        if self._forked:
            return
        self._backend = None
        self.pool.close()
        if self.thread is not None:
            self.thread.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> FusionRuntime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
