"""A conversation: what was said, how the next answer is chosen, and what the last one took. For terminals and tests."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusionroute.runtime.arguments import shown
from fusionroute.runtime.chat import ChatOptions
from fusionroute.runtime.engine import FusionRuntime
from fusionroute.runtime.errors import InputError, reason
from fusionroute.runtime.options import check_fusion
from fusionroute.runtime.sampling import Sampling
from fusionroute.runtime.text import Token

MOST_BYTES = 16 << 20  # of a file with a conversation


@dataclass
class Figures:
    """What answers took. first: seconds to the first token; seconds: behind it."""

    prompt_tokens: int = 0
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0
    experts: Counter[str] = field(default_factory=Counter)
    drafted: int = 0
    accepted: int = 0
    finish: str = ""

    @property
    def speed(self) -> float:
        """Tokens per second behind the first one; 0 without two tokens."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds else 0.0


class Conversation:
    """Messages with a loaded runtime. An answer that was stopped stays, as far as it came."""

    def __init__(
        self, runtime: FusionRuntime, max_new_tokens: int, system: str | None = None, chat: ChatOptions | None = None, **options: Any
    ):
        """chat: what the chat template is given too. options: those of `FusionRuntime.stream` that all answers have."""
        self.chat: ChatOptions = chat or {}
        self.runtime, self.max_new_tokens, self.options = runtime, max_new_tokens, dict(options)
        self._system: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._system)
        self.figures = Figures()

    def ask(self, text: str, cancel: threading.Event | None = None) -> Iterator[Token]:
        """The tokens of the answer to a text. Where it is refused, the conversation stays as it was.

        Raises what `FusionRuntime.stream` does.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        begin = time.perf_counter()
        ids = self.runtime.prompt_ids(asked, **self.chat)
        stream = self.runtime.stream(ids, self.max_new_tokens, cancel=cancel, **self.options)
        figures, tokens = Figures(len(ids)), list[str]()
        try:
            for token in stream:
                now = time.perf_counter()
                if figures.tokens:
                    figures.seconds = now - begin - figures.first
                else:
                    figures.first = now - begin
                figures.tokens += 1
                figures.experts[token.expert] += 1
                tokens.append(token.text)
                yield token
        finally:
            stream.close()
            figures.drafted, figures.accepted, figures.finish = stream.drafted, stream.accepted, stream.finish_reason or "cancelled"
            if tokens or figures.finish == "stop":
                self.messages = [*asked, {"role": "assistant", "content": "".join(tokens)}]
            self.figures = figures

    def reset(self) -> None:
        """Forget what was said, except a system message from the beginning."""
        self.messages = list(self._system)

    def choose_expert(self, name: str | None) -> None:
        """Let this expert answer every token; None: the routed one. Raises InputError."""
        if name is not None and name not in self.runtime.expert_names:
            raise InputError(f"Unknown expert {shown(name)}: use one of {', '.join(self.runtime.expert_names)}, or auto.")
        self.options["expert"] = name

    def choose_lambda(self, lam: float | None) -> None:
        """λ of the weighted fusion; None: the bundle's. Raises InputError."""
        check_fusion(None, lam)
        self.options["lam"] = lam

    def choose_temperature(self, temperature: float) -> None:
        """0: greedy. Raises InputError."""
        Sampling(temperature=temperature)
        self.options["temperature"] = temperature

    def save(self, path: Path) -> None:
        """Write the messages as JSON. Raises InputError where a file stands that holds no conversation, and OSError's reason."""
        if path.exists():
            messages_in(path)
        beside = path.with_name(f".{path.name}.part")
        try:
            beside.write_text(json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise InputError(f"{path} cannot be written ({reason(error)}): name another file.") from error

    def load(self, path: Path) -> None:
        """Go on with saved messages. Raises InputError for a file that holds none, or none that the chat template takes."""
        messages = messages_in(path)
        if messages:
            self.runtime.prompt_ids(messages, **self.chat)
        self.messages = messages


def messages_in(path: Path) -> list[dict[str, Any]]:
    """The messages in a file. Raises InputError."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)}): name a file that /save wrote.") from error
    try:
        messages = json.loads(content[:MOST_BYTES].decode())
    except (ValueError, RecursionError):
        messages = None
    if not isinstance(messages, list) or not all(isinstance(message, dict) and "role" in message for message in messages):
        raise InputError(f"{path} holds no conversation: name a file that /save wrote.")
    return messages
