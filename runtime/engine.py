"""The runtime's public face: load a bundle, then generate, stream, score, or drive a session by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fusionroute.runtime.backends import Backend, check_device
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.cancellation import Cancellation
from fusionroute.runtime.decoder import Decoder
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.generation import generate_tokens
from fusionroute.runtime.limits import CHUNK
from fusionroute.runtime.loaded_system import LoadedSystem
from fusionroute.runtime.options import RuntimeOptions, fusion_coefficients
from fusionroute.runtime.pool import Pool
from fusionroute.runtime.prompt import Prompt, PromptEncoder
from fusionroute.runtime.sampling import Sampler, SamplingOptions, sampling_of
from fusionroute.runtime.scoring import Scores, positions_to_score, score
from fusionroute.runtime.session import Session
from fusionroute.runtime.stream import End, Result, Stream, StreamOptions
from fusionroute.runtime.text import Text, TextStream, Token

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusionroute.runtime.speculation.costs import Costs

DEFAULT_NEW_TOKENS = 128


class FusionRuntime:
    """A loaded FusionRoute system.

    Thread safe: several threads may generate at once, each through a session of its own.

    `bundle`, `options`, `precision`, `expert_names`, `vocab_size`, `max_seq_len`, and the defaults `fusion` and `lam`
    say what was loaded; `tokenizer` is None for a bundle without one.
    """

    def __init__(self, bundle: Bundle, options: RuntimeOptions):
        """Use `load`."""
        self.bundle, self.options = bundle, options
        manifest = bundle.manifest
        self.fusion: str = options.fusion or manifest.fusion
        self.lam: float = manifest.lam if options.lam is None else options.lam
        self._prompts = PromptEncoder(bundle)
        self._system = LoadedSystem(bundle, options)
        self.precision = self._system.precision
        self._costs = None if options.speculation == "off" else self._speculation_costs()
        self.expert_names, self.vocab_size, self.max_seq_len = manifest.experts, manifest.vocab_size, manifest.max_seq_len
        self._eos = frozenset(manifest.eos_token_ids)
        self._pool = Pool(options.prefix_cache)

    def _speculation_costs(self) -> Costs:
        from fusionroute.runtime.speculation.costs import costs_of  # here: a tenth of the time of `import fusionroute`

        return costs_of(self.bundle, self.backend, self.precision, self.options.threads)

    def __repr__(self) -> str:
        closed = ", closed" if self._system.closed else ""
        return (
            f"<FusionRuntime of {str(self.bundle.folder)!r}: {self.precision} on {self._system.device}, "
            f"experts {', '.join(self.expert_names)}, fusion={self.fusion!r}, lam={self.lam:g}{closed}>"
        )

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
        """Open a bundle.

        `precision` defaults to the fastest it holds; `fusion` and `lam` to what was exported; `verify` hashes every
        file.

        `speculation="auto"` drafts tokens ahead where that pays on this machine. Greedy output is the same in fp32, and
        sampling keeps its distribution. Quantised models round a single token differently from several: with `exact`
        tokens are read by twos, and greedy output is the same with speculation and without.

        `catch_up="background"`: experts read the text while others answer, so that an expert that is chosen late
        answers at once. This costs their time and memory whether they are chosen or not.

        `prefix_cache`: how many finished texts keep their keys and values for prompts that begin alike, beside those in
        use. 0: every prompt is read from its beginning.

        `expert_memory`, bytes: on TensorRT devices the weights of experts beyond it wait in host memory until they are
        chosen.

        `share_weights`: processes that load the same bundle on the CPU share its weights in memory. They are packed
        once, in the user's cache folder, at some 2.3 times their size. By default each process packs a copy of its own
        in memory.

        Options are checked before anything is opened. Raises FusionError subclasses only: BundleError,
        UnavailableError, InputError.
        """
        options = RuntimeOptions(
            precision=precision, device=device, fusion=fusion, lam=lam, catch_up=catch_up, speculation=speculation, exact=exact,
            threads=threads, expert_memory=expert_memory, prefix_cache=prefix_cache, share_weights=share_weights,
        )  # fmt: skip
        check_device(options.device)
        opened = Bundle.open(bundle)
        if verify:
            opened.verify()
        return cls(opened, options)

    @property
    def tokenizer(self) -> Text | None:
        """The bundle's tokenizer, None without one."""
        return self._prompts.tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids as the bundle's tokenizer.json makes them, with its BOS. Raises UnavailableError without one."""
        return self._prompts.require_tokenizer().encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out. Raises UnavailableError without a tokenizer."""
        return self._prompts.require_tokenizer().decode(list(ids))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a str (no template), a list of ids, or a list of {"role", "content"} messages (chat template).

        Raises InputError for anything else, UnavailableError where the bundle lacks the tokenizer or the template.
        """
        return self._prompts.ids(prompt)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        *,
        on_token: Callable[[Token], Any] | None = None,
        **options: Unpack[StreamOptions],
    ) -> Result:
        """Generate to the end; options are those of `stream`.

        `on_token` is called in this thread with every token as it becomes certain. If it returns False the text ends
        there, as "cancelled"; what it raises is raised here.
        """
        tokens: list[Token] = []
        with closing(self.stream(prompt, max_new_tokens, **options)) as stream:
            for token in stream:
                tokens.append(token)
                if on_token is not None and on_token(token) is False:
                    break
        return Result.of(tokens, stream)

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

        `cancel`, once another thread sets it, and `deadline`, in seconds from this call, end the text within a token,
        also while the prompt is read; `finish_reason` is then "cancelled" or "deadline", and the tokens so far stand.

        `expert` answers every token instead of the routed one. With it and `lam=0` the router does not run, and every
        `routing` is NaN [n_experts]; with `lam=1` no expert runs. Arguments are checked here, before the first token is
        asked for. Raises InputError, UnavailableError, ClosedError.
        """
        _ = self.backend  # closed runtimes say so first
        cancellation = Cancellation(cancel, deadline)
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
        coefficients = self._coefficients(fusion, lam)
        pinned = self._expert_index(expert)
        text = TextStream(self.tokenizer, () if stop is None else stop)
        limit = min(max_new_tokens, self.max_seq_len - len(ids))
        decoder = self._pool.take(ids, self._decoder)
        try:
            decoder.restart(ids)
        except InputError:
            self._give_back(decoder)
            raise

        def tokens() -> Iterator[Token | End]:
            try:
                yield from generate_tokens(decoder, sampler, coefficients, pinned, text, limit, cancellation)
            finally:
                self._give_back(decoder)

        return Stream(tokens())

    def score(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int] | None = None,
        *,
        chunk: int = CHUNK,
        fusion: str | None = None,
        lam: float | None = None,
    ) -> Scores:
        """Teacher-forced fused logits.

        `positions` limits (and orders) the rows; `chunk=1` reads as one-token decoding does.

        Raises InputError for ids outside the vocabulary, more tokens than the context, or positions outside the tokens.
        """
        _ = self.backend
        asked = positions_to_score(len(token_ids), positions, chunk)
        coefficients = self._coefficients(fusion, lam)
        decoder = self._pool.take((), self._decoder)
        try:
            decoder.rewind(0)
            decoder.append(token_ids)
            return score(decoder.readers, decoder.step.fuser, self.vocab_size, asked, chunk, coefficients)
        finally:
            self._give_back(decoder)

    def session(self, fusion: str | None = None, lam: float | None = None, expert: str | None = None) -> Session:
        """A new empty session with its own KV caches. `expert`: answers every token instead of the routed one.

        Raises InputError, ClosedError.
        """
        _ = self.backend
        self._coefficients(fusion, lam)
        pinned = self._expert_index(expert)
        weight = self.lam if lam is None else lam
        return Session(self._decoder(), self.expert_names, self.tokenizer, fusion or self.fusion, weight, pinned)

    def _coefficients(self, fusion: str | None, lam: float | None) -> tuple[float, float]:
        """Weights of router and expert logits, by default those of this runtime. Raises InputError."""
        return fusion_coefficients(fusion or self.fusion, self.lam if lam is None else lam)

    def _expert_index(self, expert: str | None) -> int | None:
        """The index of a named expert. Raises InputError for a name that the bundle does not have."""
        if expert is None:
            return None
        if expert not in self.expert_names:
            raise InputError(f"Unknown expert '{expert}': use one of {', '.join(self.expert_names)}.")
        return self.expert_names.index(expert)

    def _decoder(self) -> Decoder:
        return Decoder(self._system, self._costs, self._eos)

    def _give_back(self, decoder: Decoder) -> None:
        decoder.sequence.cancellation = None
        decoder.readers.pause()
        if not self._system.forked:
            self._pool.give(decoder)

    @property
    def backend(self) -> Backend:
        """The loaded models. Raises ClosedError after `close`, and in another process than the one that loaded them."""
        return self._system.backend

    def close(self) -> None:
        """Release models and buffers; sessions still in use, in any thread, end with ClosedError at their next step."""
        if self._system.forked:
            return
        self._system.close()
        self._pool.close()

    def __enter__(self) -> FusionRuntime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
