"""Training data: JSONL files of samples or preferences, tokenised exactly as generation sees them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.training.sample_format import PREFERENCE_FORMS, SFT_FORMS, Forms, faults
from fusionroute.runtime.chat import render
from fusionroute.runtime.errors import InputError, one_line
from fusionroute.runtime.strict_json import why_no_json

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One sequence: `ids` int32 [S], and `learnt` bool [S], True for the tokens of answers.

    The first token is never learnt.
    """

    ids: npt.NDArray[np.int32]
    learnt: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, pieces: Sequence[tuple[Sequence[int], bool]]) -> "Row":
        """The row of consecutive pieces (token ids, whether they are learnt)."""
        ids = [id for piece, _ in pieces for id in piece]
        learnt = [flag for piece, flag in pieces for _ in piece]
        return cls(np.array(ids, np.int32), np.array(learnt, np.bool_))

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Positions [T] whose next token is learnt."""
        return np.flatnonzero(self.learnt[1:])

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """The learnt tokens [T], in the order of `positions`."""
        return self.ids[1:][self.learnt[1:]]


class Pair(NamedTuple):
    """Two answers to one prompt."""

    chosen: Row
    rejected: Row


class Encoder:
    """Turns samples into rows with a checkpoint's tokenizer and chat template.

    Prompt and answer are tokenised separately, as in generation. Raises InputError where the checkpoint has no
    tokenizer.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        if checkpoint.tokenizer is None or checkpoint.vocabulary is None:
            raise InputError(f"{checkpoint.where} has no tokenizer.json, so text cannot be tokenised: copy its family's into it.")
        self._checkpoint = checkpoint
        self._tokenizer = checkpoint.tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        token_of = {id: token for token, id in checkpoint.vocabulary.items()}
        self._ends = [token_of[id] for id in checkpoint.end_tokens if id in token_of]
        self._eos = self._end_of_text(checkpoint.vocabulary)

    def plain(self, prompt: str, answer: str) -> Row:
        """Plain text: the prompt with the BOS that tokenizer.json adds, the answer, and the tokenizer's EOS."""
        return Row.of([(self._encode(prompt, True), False), ([*self._encode(answer, False), self._eos], True)])

    def chat(self, prompt: Sequence[dict[str, str]], answers: Sequence[dict[str, str]]) -> Row:
        """A conversation: the assistant's turns among `answers` are learnt, each with the token that ends it.

        Raises InputError where the template refuses the messages or does not write a conversation turn by turn.
        """
        messages = [*prompt, *answers]
        whole = self._render(messages, False)
        pieces: list[tuple[list[int], bool]] = []
        written = ""
        for number in range(len(prompt), len(messages)):
            if messages[number].get("role") != "assistant":
                continue
            opened = self._render(messages[:number], True)
            closed = self._render(messages[: number + 1], False) if number + 1 < len(messages) else whole
            if not (opened.startswith(written) and closed.startswith(opened) and whole.startswith(closed)):
                raise InputError("the chat template rewrites earlier turns, so turns cannot be learnt one by one: use single turns")
            answer = closed[len(opened) :]
            # What follows the end token (Gemma's line break) belongs to the next prompt: no model generates it.
            stop = max((answer.rfind(end) + len(end) for end in self._ends if end in answer), default=0)
            if not stop:
                raise InputError(f"the chat template closes the assistant's turn with none of the end tokens {', '.join(self._ends)}")
            pieces += [(self._encode(opened[len(written) :], False), False), (self._encode(answer[:stop], False), True)]
            written = opened + answer[:stop]
        if not pieces:
            raise InputError("no message of the role 'assistant' to learn")
        return Row.of(pieces)

    def answer(self, prompt: Any, answer: Any) -> Row:
        """`plain` of two texts, `chat` of two lists of messages."""
        return self.plain(prompt, answer) if isinstance(prompt, str) else self.chat(prompt, answer)

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        except TypeError as error:  # lone surrogates
            raise InputError("the text is not valid Unicode") from error
        return ids

    def _render(self, messages: list[dict[str, str]], opens: bool) -> str:
        if self._checkpoint.chat_template is None:
            raise InputError(f"{self._checkpoint.where} has no chat template for messages: add chat_template.jinja, or give texts")
        return render(self._checkpoint.chat_template, messages, add_generation_prompt=opens, **self._checkpoint.named_tokens)

    def _end_of_text(self, vocabulary: dict[str, int]) -> int:
        """The id of the tokenizer's eos_token; without one, the first that config.json names."""
        text = self._checkpoint.named_tokens.get("eos_token")
        if text in vocabulary:
            return vocabulary[text]
        if self._checkpoint.end_tokens:
            return self._checkpoint.end_tokens[0]
        raise InputError(f"{self._checkpoint.where} names no end-of-text token: set eos_token in its tokenizer_config.json.")


class Problem(NamedTuple):
    """A line that cannot be learnt from. `field` is empty where the whole line is wrong."""

    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.line}: {self.field}: {self.reason}" if self.field else f"{self.line}: {self.reason}"


@dataclass(frozen=True)
class DataFile(Generic[T]):
    """What a file holds: its samples with their lines, all problems, and (line, line that it repeats) of duplicates."""

    file: Path
    samples: list[T]
    lines: list[int]
    problems: list[Problem]
    duplicates: list[tuple[int, int]]

    def checked(self) -> list[T]:
        """The samples. Raises InputError, with file, line and field of the first problem, where there are any."""
        if self.problems:
            more = len(self.problems) - 1
            rest = f" ({more} more like this: --check-data lists them)" if more else ""
            raise InputError(f"{self.file}:{str(self.problems[0]).rstrip('.')}{rest}.")
        return self.samples


def examine_sft(file: Path, encoder: Encoder) -> DataFile[Row]:
    """A JSONL file of samples. Raises InputError for one that is empty or cannot be opened."""

    def row(sample: dict[str, Any]) -> Row:
        if "messages" in sample:
            return encoder.chat([], sample["messages"])
        return encoder.answer(sample["prompt"], sample["completion"])

    return _examine(file, SFT_FORMS, row)


def examine_preferences(file: Path, encoder: Encoder) -> DataFile[Pair]:
    """A JSONL file of preferences (TRL's formats). Raises InputError for one that is empty or cannot be opened."""

    def pair(sample: dict[str, Any]) -> Pair:
        return Pair(encoder.answer(sample["prompt"], sample["chosen"]), encoder.answer(sample["prompt"], sample["rejected"]))

    return _examine(file, PREFERENCE_FORMS, pair)


def read_sft(file: Path, encoder: Encoder) -> list[Row]:
    """The rows of a JSONL file of samples. Raises InputError `file:line: …` for a line that is not a sample."""
    return examine_sft(file, encoder).checked()


def read_preferences(file: Path, encoder: Encoder) -> list[Pair]:
    """The pairs of a JSONL file of preferences. Raises InputError `file:line: …` for a line that is not a preference."""
    return examine_preferences(file, encoder).checked()


def fitting(samples: Sequence[T], length: Callable[[T], int], limit: int, what: str) -> tuple[list[T], int]:
    """The samples of at most `limit` tokens, and how many were left out. Raises InputError where none is left."""
    short = [sample for sample in samples if length(sample) <= limit]
    if not short:
        raise InputError(
            f"All {len(samples)} {what} are longer than {limit} tokens: raise --max-length." if samples else f"There are no {what}."
        )
    return short, len(samples) - len(short)


def _examine(file: Path, forms: Forms, encode: Callable[[dict[str, Any]], T]) -> DataFile[T]:
    try:
        lines = file.read_bytes().split(b"\n")  # JSON may hold other line breaks
    except OSError as error:
        raise InputError(f"The training data {file} cannot be read ({one_line(error)}): name a JSONL file in UTF-8.") from error
    if not any(line.strip() for line in lines):
        raise InputError(f"The training data {file} is empty; expected one JSON object per line.")
    data: DataFile[T] = DataFile(file, [], [], [], [])
    first_with: dict[str, int] = {}  # content → line
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line.decode())
        except ValueError as error:
            data.problems.append(Problem(number, "", no_json(line, error)))
            continue
        if wrong := [Problem(number, *fault) for fault in faults(sample, forms)]:
            data.problems.extend(wrong)
            continue
        try:
            data.samples.append(encode(sample))
        except InputError as error:
            data.problems.append(Problem(number, "", one_line(error)))
            continue
        data.lines.append(number)
        content = json.dumps([sample.get(field) for form in forms for field in form], sort_keys=True)
        if (earlier := first_with.setdefault(content, number)) != number:
            data.duplicates.append((number, earlier))
    return data


def no_json(line: bytes, error: ValueError) -> str:
    """Why a line of training data is refused."""
    if isinstance(error, UnicodeDecodeError):
        return f"no UTF-8 ({one_line(error)})"
    return f"no JSON object, since {why_no_json(line.decode(), error)}"
