"""Prompts to token ids, and token ids to text, with what the bundle has of a tokenizer and a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from fusionroute.runtime.arguments import UNORDERED_OR_TEXT, token_ids
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.cancellation import Cancellation
from fusionroute.runtime.chat import DEFAULT, ChatOptions, ChatTemplates
from fusionroute.runtime.chat_messages import Message, is_message
from fusionroute.runtime.errors import BundleError, InputError, UnavailableError, one_line
from fusionroute.runtime.strict_json import check_json
from fusionroute.runtime.text import Text

if TYPE_CHECKING:
    from typing_extensions import Unpack

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
CHAT_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"  # a file, and a folder of others
MOST_BYTES = 1 << 22  # of a chat template or a tokenizer_config.json: common ones have 50,000
SHORT = 4096  # characters: encoded in a few milliseconds, whatever they are
NEVER = Cancellation()
Prompt = str | Sequence[int] | Sequence[Message]


def tokenizer_of(bundle: Bundle) -> Text | None:
    """A bundle's tokenizer, None where it has none. Raises BundleError for a tokenizer.json that cannot be read."""
    if TOKENIZER not in bundle.manifest.files:
        return None
    return Text.parse(bundle.read(TOKENIZER), bundle.folder / TOKENIZER)


def chat_templates_of(bundle: Bundle) -> ChatTemplates | None:
    """A bundle's chat templates, None where it has none. Raises BundleError for files that cannot be read."""
    names = {CHAT_TEMPLATE: DEFAULT} | {
        name: PurePosixPath(name).stem
        for name in bundle.manifest.files
        if name.startswith(f"{MORE_TEMPLATES}/") and name.endswith(".jinja")
    }
    templates = {name: text for file, name in names.items() if (text := small_text(bundle, file)) is not None}
    return ChatTemplates(templates, special_tokens_of(bundle)) if templates else None


def special_tokens_of(bundle: Bundle) -> dict[str, str]:
    """Special tokens by their names in chat templates, such as eos_token. Raises BundleError for a broken tokenizer_config.json."""
    manifest, content = bundle.manifest, small_text(bundle, TOKENIZER_CONFIG)
    if content is None:  # of older versions
        tokens = {"bos_token": manifest.bos_token, "eos_token": manifest.eos_token}
        return {name: token for name, token in tokens.items() if token is not None}
    try:
        check_json(content)
        config = json.loads(content)
        if not isinstance(config, dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:
        raise BundleError(f"{bundle.folder / TOKENIZER_CONFIG} cannot be read ({one_line(error)}); export the bundle again.") from error
    return {name: value for name, value in config.items() if name.endswith("_token") and isinstance(value, str)}


def small_text(bundle: Bundle, name: str) -> str | None:
    """A text file of a bundle, None where it has none. Raises BundleError, also for one that no checkpoint has so large."""
    entry = bundle.manifest.files.get(name)
    if entry is not None and entry.bytes > MOST_BYTES:
        raise BundleError(f"{bundle.folder / name} has {entry.bytes} bytes, expected {MOST_BYTES} at most; export the bundle again.")
    return bundle.text(name)


class PromptEncoder:
    """`tokenizer` is None for a bundle without one: its prompts are token ids."""

    def __init__(self, bundle: Bundle):
        """Raises BundleError for a tokenizer.json that cannot be read."""
        self.tokenizer = tokenizer_of(bundle)
        self._folder, self._capacity = bundle.folder, bundle.manifest.max_seq_len
        self._chat_templates = chat_templates_of(bundle)

    def require_tokenizer(self) -> Text:
        """The tokenizer. Raises UnavailableError without one."""
        if self.tokenizer is None:
            raise UnavailableError(f"The bundle {self._folder} has no tokenizer.json: pass token ids instead of text.")
        return self.tokenizer

    def fitting_ids(self, prompt: Prompt, cancellation: Cancellation, **chat: Unpack[ChatOptions]) -> list[int]:
        """`ids` of a prompt that leaves room for a token. Raises InputError for others, and Interrupted."""
        ids = self.ids(prompt, cancellation, **chat)
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

    def ids(self, prompt: Prompt, cancellation: Cancellation = NEVER, **chat: Unpack[ChatOptions]) -> list[int]:
        """Token ids of a str (no template), a list of ids, or a list of {"role", "content"} messages (chat template).

        Raises InputError for anything else, for options of `chat` without messages, and for a text that cannot fit the
        context; UnavailableError where the bundle lacks the tokenizer or the template; Interrupted, where
        `cancellation` ends it on the way.
        """
        given: object = prompt
        items: list[Any] = list(prompt) if isinstance(given, Iterable) and not isinstance(given, UNORDERED_OR_TEXT) else [None]
        if items and all(map(is_message, items)):
            if self._chat_templates is None:
                raise UnavailableError(f"The bundle {self._folder} has no {CHAT_TEMPLATE}: pass text or token ids.")
            return self._encode(self._chat_templates.render(items, **chat), False, cancellation)
        if asked := [name for name, value in chat.items() if value is not None and value is not False]:
            raise InputError(f"{asked[0]} is for the chat template: pass the prompt as a list of {{'role', 'content'}} messages.")
        if isinstance(prompt, str):
            return self._encode(prompt, True, cancellation)
        try:
            return token_ids(items)
        except InputError as error:
            raise InputError("A prompt must be a str, a list of token ids, or a list of {'role', 'content'} messages.") from error
