"""The runtime's public face: load a bundle, then generate, stream, score, or drive a session by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fusionroute.runtime.arguments import check_names, flag, path, shown, text, whole
from fusionroute.runtime.arguments import token_ids as whole_ids
from fusionroute.runtime.backends import Backend, check_device
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.cancellation import Cancellation, Interrupted
from fusionroute.runtime.chat import ChatOptions
from fusionroute.runtime.errors import FusionError, InputError
from fusionroute.runtime.expert_sets import ExpertSets
from fusionroute.runtime.generation import Generation
from fusionroute.runtime.grammar_compiler import GrammarCompiler
from fusionroute.runtime.integrity import begun_trial, checked
from fusionroute.runtime.limits import CHUNK
from fusionroute.runtime.options import RuntimeOptions, fusion_coefficients, fusion_or
from fusionroute.runtime.prompt import Prompt, PromptEncoder
from fusionroute.runtime.sampling import sampling_of
from fusionroute.runtime.scoring import Scores, positions_to_score
from fusionroute.runtime.session import Session
from fusionroute.runtime.stream import Result, Stream, StreamOptions, TextOptions, split
from fusionroute.runtime.text import Text, Token
from fusionroute.runtime.text_stream import TextStream

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_NEW_TOKENS = 128
GENERATE_OPTIONS = ("max_new_tokens", "on_token", *StreamOptions.__annotations__)


class FusionRuntime:
    """A loaded FusionRoute system.

    Thread safe: several threads may generate at once, each through a session of its own.

    `bundle`, `options`, `precision`, `vocab_size`, `max_seq_len`, and the defaults `fusion` and `lam`
    say what was loaded; `tokenizer` is None for a bundle without one.
    """

    def __init__(self, bundle: Bundle, options: RuntimeOptions, models_are_loaded: Callable[[], None] = lambda: None):
        """Use `load`."""
        self.bundle, self.options = bundle, options
        manifest = bundle.manifest
        self.fusion: str = options.fusion or manifest.fusion
        self.lam: float = manifest.lam if options.lam is None else options.lam
        self._sets = ExpertSets(bundle, options)
        try:
            models_are_loaded()
            self._prompts = PromptEncoder(bundle)
        except FusionError:
            self._sets.close()
            raise
        self.precision = self._sets.current.system.precision
        self.vocab_size, self.max_seq_len = manifest.vocab_size, manifest.max_seq_len
        self._grammars = GrammarCompiler(self._prompts.tokenizer, self.vocab_size, manifest.eos_token_ids)

    def __repr__(self) -> str:
        system = self._sets.current.system
        return (
            f"<FusionRuntime of {str(self.bundle.folder)!r}: {self.precision} on {system.device}, "
            f"experts {', '.join(self.expert_names)}, fusion={self.fusion!r}, lam={self.lam:g}{', closed' if system.closed else ''}>"
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
        kv_memory: int | None = None,
        prefix_cache: int = 1,
        share_weights: bool = False,
        on_expert_failure: str = "raise",
        verify: bool = False,
        verify_key: str | Path | None = None,
        trusted: bool = False,
    ) -> FusionRuntime:
        """Open a bundle.

        `precision` defaults to the fastest it holds; `fusion` and `lam` to what was exported. At the first load on this
        machine, and with `verify` at each, every file is hashed; `verify` also looks for weights that are not finite.

        `verify_key`: the file of a public key (PEM, Ed25519) whose owner must have signed the bundle, see
        `fusionroute sign`. No file may then lie in the bundle that the signed manifest does not name.

        `speculation="auto"` drafts tokens ahead where that pays on this machine. Greedy output is the same in fp32, and
        sampling keeps its distribution. Quantised models round a single token differently from several: with `exact`
        tokens are read by twos, and greedy output is the same with speculation and without.

        `catch_up="background"`: experts read the text while others answer, so that an expert that is chosen late
        answers at once. This costs their time and memory whether they are chosen or not.

        `prefix_cache`: how many finished texts keep their keys and values for prompts that begin alike, beside those in
        use. 0: every prompt is read from its beginning.

        `kv_memory`, bytes: all texts' keys and values. Finished texts make room, the oldest first; where that does not
        do, the pass that needs more ends in an UnavailableError. `expert_memory`, bytes for experts' weights: they come
        when they are chosen, and the least recently used leave.

        `share_weights`: processes that load the same bundle on the CPU share its weights in memory, packed once in the
        user's cache folder at some 2.3 times their size. By default each process packs its own copy. `trusted`, for
        bundles of your own: the tokenizer is not tried in another process at the first load.

        `on_expert_failure="router_only"`: where an expert's device fails, or its answer is not finite, the router answers
        alone until the text ends, or a session is rewound; such tokens bear the router's name. By default the error is
        raised.

        Options are checked before anything is opened. Raises BundleError, UnavailableError, InputError.
        """
        options = RuntimeOptions(
            precision=precision, device=device, fusion=fusion, lam=lam, catch_up=catch_up, speculation=speculation, exact=exact,
            threads=threads, expert_memory=expert_memory, kv_memory=kv_memory, prefix_cache=prefix_cache, share_weights=share_weights,
            on_expert_failure=on_expert_failure,
        )  # fmt: skip
        check_device(options.device)
        folder, everything = path("bundle", bundle), flag("verify", verify)
        key = None if verify_key is None else path("verify_key", verify_key)
        with begun_trial(folder, everything, flag("trusted", trusted)) as trial:
            opened = Bundle.open(folder, key)
            with checked(opened, everything, trial) as models_are_loaded:
                return cls(opened, options, models_are_loaded)

    @property
    def expert_names(self) -> list[str]:
        """The experts of new sessions, in the order of the routing head's rows."""
        return list(self._sets.current.names)

    def add_expert(self, folder: str | Path, name: str | None = None) -> None:
        """Let sessions and streams that begin from now on choose an expert more: a LoRA adapter of the bundle's base.

        folder: as PEFT writes it. name: of a row of the routing head; None: the folder's. An expert of that name is
        replaced. Running sessions keep the experts that they began with. The bundle stays as it is
        (`fusionroute add-expert` changes it).

        Raises InputError for another name, and for an adapter that does not fit; UnavailableError for a bundle without
        one base for all models; ClosedError.
        """
        source = path("folder", folder).expanduser()
        self._sets.add(source, source.resolve().name if name is None else text("name", name))

    def remove_expert(self, name: str) -> None:
        """Let sessions and streams that begin from now on do without an expert. Running ones keep it.

        Its row of the routing head is not scored any more. Raises InputError for a name that is no expert's and for the
        only expert, UnavailableError for a bundle without one base for all models, ClosedError.
        """
        self._sets.remove(text("name", name))

    @property
    def tokenizer(self) -> Text | None:
        """The bundle's tokenizer, None without one."""
        return self._prompts.tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids as the bundle's tokenizer.json makes them, with its BOS. Raises UnavailableError without one."""
        return self._prompts.require_tokenizer().encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out. Raises UnavailableError without a tokenizer."""
        return self._prompts.require_tokenizer().decode(whole_ids(ids))

    def prompt_ids(self, prompt: Prompt, **chat: Unpack[ChatOptions]) -> list[int]:
        """Token ids of a str (no template), a list of ids, or a list of {"role", "content"} messages (chat template).

        Raises InputError for anything else, UnavailableError where the bundle lacks the tokenizer or the template.
        """
        check_names(chat, tuple(ChatOptions.__annotations__))
        return self._prompts.ids(prompt, **chat)

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
        check_names(options, GENERATE_OPTIONS)
        if on_token is not None and not callable(on_token):
            raise InputError(f"on_token is {shown(on_token)}, expected a function of a token, or None.")
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
        drafts: bool = True,
        cancel: threading.Event | None = None,
        deadline: float | None = None,
        **options: Unpack[TextOptions],
    ) -> Stream:
        """Generate token by token. `options` are the fields of `Sampling` (greedy by default), those of `TextRules`, such
        as `grammar`, and for messages those of `ChatOptions`, such as `tools`.

        `cancel`, once another thread sets it, and `deadline`, in seconds from this call, end the text within a token,
        also while the prompt is encoded and read; `finish_reason` is then "cancelled" or "deadline", and the tokens so far stand.

        `expert` answers every token instead of the routed one. With it and `lam=0` the router does not run, and every
        `routing` is NaN [n_experts]; with `lam=1` no expert runs. Arguments are checked here, before the first token is
        asked for. `drafts=False`: nothing is drafted, whatever the runtime was loaded with. Raises InputError,
        UnavailableError, ClosedError.
        """
        _ = self.backend  # closed runtimes say so first
        cancellation, max_new_tokens = Cancellation(cancel, deadline), whole("max_new_tokens", max_new_tokens, 1)
        chat, rules, sampling = split(options)
        ends = rules.ends(self.bundle.manifest.eos_token_ids, self.vocab_size)
        settings = sampling_of(sampling)
        coefficients = self._coefficients(fusion, lam)
        experts = self._sets.current
        pinned, drafts = experts.index(expert), flag("drafts", drafts)
        output = TextStream(self.tokenizer, () if stop is None else stop)
        try:
            sampler = rules.sampler(settings, self.vocab_size, ends, self._grammars, cancellation)
            ids = self._prompts.fitting_ids(prompt, cancellation, **chat)
        except Interrupted:
            return Stream.ended(cancellation.reason or "cancelled")
        limit = min(max_new_tokens, self.max_seq_len - len(ids))
        return experts.stream(ids, Generation(sampler, coefficients, pinned, output, ends, limit, cancellation, drafts))

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
        ids, chunk = whole_ids(token_ids), whole("chunk", chunk, 1)
        asked = positions_to_score(len(ids), positions)
        coefficients = self._coefficients(fusion, lam)
        return self._sets.current.score(ids, asked, chunk, coefficients)

    def session(self, fusion: str | None = None, lam: float | None = None, expert: str | None = None) -> Session:
        """A new empty session with its own KV caches. `expert`: answers every token instead of the routed one.

        Raises InputError, ClosedError.
        """
        _ = self.backend
        self._coefficients(fusion, lam)
        return self._sets.current.session(self.tokenizer, fusion or self.fusion, self.lam if lam is None else lam, expert)

    def _coefficients(self, fusion: str | None, lam: float | None) -> tuple[float, float]:
        """Weights of router and expert logits, by default those of this runtime. Raises InputError."""
        return fusion_coefficients(fusion_or(fusion, self.fusion), self.lam if lam is None else lam)

    @property
    def backend(self) -> Backend:
        """The loaded models. Raises ClosedError after `close`, and in another process than the one that loaded them."""
        return self._sets.current.system.backend

    def close(self) -> None:
        """Release models and buffers; sessions still in use, in any thread, end with ClosedError at their next step."""
        self._sets.close()

    def __enter__(self) -> FusionRuntime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
