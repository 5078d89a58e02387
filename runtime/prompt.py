"""Prompts to token ids, and token ids to text, with what the bundle has of a tokenizer and a chat template."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fusionroute.runtime.arguments import UNORDERED_OR_TEXT, token_ids
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.cancellation import Cancellation
from fusionroute.runtime.chat import render
from fusionroute.runtime.errors import InputError, UnavailableError
from fusionroute.runtime.text import Text

TOKENIZER = "tokenizer.json"
SHORT = 4096  # characters: encoded in a few milliseconds, whatever they are
NEVER = Cancellation()
Prompt = str | Sequence[int] | Sequence[dict[str, str]]


def tokenizer_of(bundle: Bundle) -> Text | None:
    """A bundle's tokenizer, None where it has none. Raises BundleError for a tokenizer.json that cannot be read."""
    if TOKENIZER not in bundle.manifest.files:
        return None
    return Text.parse(bundle.read(TOKENIZER), bundle.folder / TOKENIZER)


class PromptEncoder:
    """`tokenizer` is None for a bundle without one: its prompts are token ids."""

    def __init__(self, bundle: Bundle):
        """Raises BundleError for a tokenizer.json that cannot be read."""
        self.tokenizer = tokenizer_of(bundle)
        self._folder, self._capacity = bundle.folder, bundle.manifest.max_seq_len
        self._chat_template = bundle.text("chat_template.jinja")
        self._bos, self._eos = bundle.manifest.bos_token or "", bundle.manifest.eos_token or ""

    def require_tokenizer(self) -> Text:
        """The tokenizer. Raises UnavailableError without one."""
        if self.tokenizer is None:
            raise UnavailableError(f"The bundle {self._folder} has no tokenizer.json: pass token ids instead of text.")
        return self.tokenizer

    def fitting_ids(self, prompt: Prompt, cancellation: Cancellation) -> list[int]:
        """`ids` of a prompt that leaves room for a token. Raises InputError for others, and Interrupted."""
        ids = self.ids(prompt, cancellation)
        if not ids:
            raise InputError("The prompt is empty: it needs at least one token.")
        if len(ids) >= self._capacity:
            raise InputError(
                f"The prompt has {len(ids)} tokens, which leaves no room in the context of {self._capacity}: "
                "shorten it or export with a larger --max-seq-len."
            )
        return ids

    def _encode(self, text: str, special: bool, cancellation: Cancellation) -> list[int]:
        """Token ids of a text that may fit: tokens have so many characters at most. Raises InputError for a longer one."""
        tokenizer = self.require_tokenizer()
        if len(text) > SHORT and len(text) > (most := self._capacity * tokenizer.longest):
            raise InputError(
                f"The prompt has {len(text)} characters, and a context of {self._capacity} tokens holds at most {most}: "
                "shorten it or export with a larger --max-seq-len."
            )
        if len(text) <= SHORT:
            return tokenizer.encode(text, special=special)
        return cancellation.wait_for(lambda: tokenizer.encode(text, special=special))

    def ids(self, prompt: Prompt, cancellation: Cancellation = NEVER) -> list[int]:
        """Token ids of a str (no template), a list of ids, or a list of {"role", "content"} messages (chat template).

        Raises InputError for anything else, and for a text that cannot fit the context; UnavailableError where the
        bundle lacks the tokenizer or the template; Interrupted, where `cancellation` ends it on the way.
        """
        if isinstance(prompt, str):
            return self._encode(prompt, True, cancellation)
        given: object = prompt
        items: list[Any] = list(prompt) if isinstance(given, Iterable) and not isinstance(given, UNORDERED_OR_TEXT) else [None]
        if items and all(isinstance(item, dict) for item in items):
            if self._chat_template is None:
                raise UnavailableError(f"The bundle {self._folder} has no chat_template.jinja: pass text or token ids.")
            text = render(self._chat_template, items, bos_token=self._bos, eos_token=self._eos)
            return self._encode(text, False, cancellation)
        try:
            return token_ids(items)
        except InputError as error:
            raise InputError("A prompt must be a str, a list of token ids, or a list of {'role', 'content'} messages.") from error
