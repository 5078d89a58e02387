"""Prompts to token ids, and token ids to text, with what the bundle has of a tokenizer and a chat template."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fusionroute.runtime.arguments import UNORDERED_OR_TEXT, token_ids
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.chat import render
from fusionroute.runtime.errors import InputError, UnavailableError
from fusionroute.runtime.text import Text

TOKENIZER = "tokenizer.json"
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
        self._folder = bundle.folder
        self._chat_template = bundle.text("chat_template.jinja")
        self._bos, self._eos = bundle.manifest.bos_token or "", bundle.manifest.eos_token or ""

    def require_tokenizer(self) -> Text:
        """The tokenizer. Raises UnavailableError without one."""
        if self.tokenizer is None:
            raise UnavailableError(f"The bundle {self._folder} has no tokenizer.json: pass token ids instead of text.")
        return self.tokenizer

    def ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a str (no template), a list of ids, or a list of {"role", "content"} messages (chat template).

        Raises InputError for anything else, UnavailableError where the bundle lacks the tokenizer or the template.
        """
        if isinstance(prompt, str):
            return self.require_tokenizer().encode(prompt)
        given: object = prompt
        items: list[Any] = list(prompt) if isinstance(given, Iterable) and not isinstance(given, UNORDERED_OR_TEXT) else [None]
        if items and all(isinstance(item, dict) for item in items):
            if self._chat_template is None:
                raise UnavailableError(f"The bundle {self._folder} has no chat_template.jinja: pass text or token ids.")
            text = render(self._chat_template, items, bos_token=self._bos, eos_token=self._eos)
            return self.require_tokenizer().encode(text, special=False)
        try:
            return token_ids(items)
        except InputError as error:
            raise InputError("A prompt must be a str, a list of token ids, or a list of {'role', 'content'} messages.") from error
