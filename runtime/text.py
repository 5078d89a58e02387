"""Encoding, decoding, and a stream that gives each token its text: whole characters only, up to a stop string."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fusionroute.runtime.arguments import shown
from fusionroute.runtime.errors import BundleError, FusionError, InputError, one_line
from fusionroute.runtime.stop_strings import begun, met

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # decoders write it for bytes that are not, or not yet, a character
MAX_CHARACTER_BYTES = 4  # of UTF-8


def failed(error: BaseException) -> FusionError:
    """What to raise for an error of the native library, whose panics are no Exceptions. Raises others, as Ctrl-C, again."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # pyo3 gives it no name to import
        raise error
    return FusionError(f"The tokenizer fails on this text ({one_line(error)}); export the bundle again.")


Ranked = tuple[tuple[int, float], ...]  # ids, the likeliest first, with their log-probabilities


class Likeliest(NamedTuple):
    """The likeliest tokens at one place, at temperature 1 and without penalties: by the router, by the expert that
    answered, and by their fusion. Empty for a model that did not run.
    """

    router: Ranked
    expert: Ranked
    fused: Ranked


@dataclass(slots=True)
class Token:
    """One generated token.

    `logprob` is that of the fused distribution at temperature 1; `text` is what it adds to the decoded text.
    `top_logprobs`: the likeliest ids with their log-probabilities in the same distribution, as many as were asked for.
    `candidates`: those of router and expert too, where they were asked for.
    """

    id: int
    expert: str
    logprob: float
    routing: npt.NDArray[np.float32] = field(compare=False)  # [n_experts]
    text: str = ""
    top_logprobs: Ranked = ()
    candidates: Likeliest | None = None


class Text:
    """A bundle's tokenizer. `special`: the special tokens, id → how it is spelled."""

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        # A tokenizer.json left over from training may truncate or pad prompts without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.special: dict[int, str] = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._bytes: dict[int, int] = {}  # byte-fallback tokens, and the byte that each stands for
        letter = tokenizer.token_to_id("<0x41>")
        if letter is not None and self.decode([letter]) == "A":
            ids = {byte: tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
            self._bytes = {id: byte for byte, id in ids.items() if id is not None}

    @classmethod
    def load(cls, path: str | Path) -> "Text":
        """Read a `tokenizer.json`. Raises BundleError for a file that is missing or is not a tokenizer."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise BundleError(f"{path} cannot be read as a tokenizer.json ({error.strerror}); export the bundle again.") from error
        return cls.parse(content, path)

    @classmethod
    def parse(cls, content: bytes, path: str | Path) -> "Text":
        """A tokenizer from the content of its file; `path` tells where it was. Raises BundleError where it is none."""
        from tokenizers import Tokenizer

        try:
            return cls(Tokenizer.from_str(content.decode()))
        except BaseException as error:  # tokenizers raises nothing more precise
            failed(error)
            raise BundleError(f"{path} cannot be read as a tokenizer.json ({one_line(error)}); export the bundle again.") from error

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def json(self) -> str:
        """The tokenizer as a tokenizer.json, without truncation and padding."""
        content: str = self._tokenizer.to_str()
        return content

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, with the special tokens of tokenizer.json (BOS); `special=False` for text from a chat template.

        Other threads run meanwhile. Raises InputError unless `text` is a str of whole characters, FusionError where the
        tokenizer fails on it.
        """
        try:
            # a batch of one text, which must be no pair of texts: `encode` (0.23) holds the GIL
            ids: list[int] = self._tokenizer.encode_batch(["" + text], add_special_tokens=special)[0].ids
        except TypeError as error:  # also for surrogates, such as undecodable bytes of a command line
            raise InputError("The text is not a str of valid Unicode characters: pass text that was decoded as UTF-8.") from error
        except BaseException as error:
            raise failed(error) from error
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary add nothing.

        Raises InputError for one that is not a whole number from 0, FusionError where the tokenizer fails on them.
        """
        try:
            text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        except (TypeError, OverflowError) as error:
            raise InputError("The token ids are not all whole numbers from 0: pass ids as `encode` gives them.") from error
        except BaseException as error:
            raise failed(error) from error
        return text

    def piece(self, id: int) -> str:
        """What a token adds to a text, special tokens too; not cut at a character's end."""
        once, twice = (self.decode([id] * count, skip_special_tokens=False) for count in (1, 2))  # a text's first loses its space
        return twice[len(once) :]

    def silent(self, id: int) -> bool:
        """Whether `decode` leaves this id out: special tokens, and ids that pad the vocabulary."""
        return id in self.special or self._tokenizer.id_to_token(id) is None

    def byte(self, id: int) -> int | None:
        """The byte that a byte-fallback token stands for; None for all other tokens."""
        return self._bytes.get(id)


class _Detokeniser:
    """Decodes a few tokens at each step; all pieces together are `text.decode` of all ids.

    `push` and `finish` return the pieces that have become certain, one per token in order. `open`: the last piece gets
    an UNFINISHED if the text ends here, because its token ends inside a character.
    """

    # tokenizers' DecodeStream (0.23) drops a text's unfinished end, and raises on invalid runs of byte-fallback tokens

    def __init__(self, text: Text):
        self._text = text
        self.open = False
        # The last few tokens. A decoder may treat the very first token differently (no leading space), and the bytes
        # of an unfinished character lie in at most three tokens. Tokens that decode to nothing are left out.
        self._context: list[int] = []
        # Byte tokens, with silent tokens among them. The decoder reads a run of bytes as a whole: either all of it is
        # text, or every byte becomes an UNFINISHED.
        self._run: list[int] = []

    def push(self, id: int) -> list[str]:
        silent = self._text.silent(id)
        if self._text.byte(id) is not None or (silent and self._run):
            self._run.append(id)
            return []
        return [*self.finish(), "" if silent else self._extend([id])]

    def finish(self) -> list[str]:
        """End the run of byte tokens, if there is one."""
        if not self._run:
            return []
        values = [self._text.byte(id) for id in self._run]
        whole = self._extend([id for id in self._run if self._text.byte(id) is not None], ended=True)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(b"" if value is None else bytes([value])) for value in values]
        self._run = []
        return pieces if "".join(pieces) == whole else [""] * (len(pieces) - 1) + [whole]

    def _extend(self, ids: list[int], *, ended: bool = False) -> str:
        """The text that these ids add, as far as it is certain: a last UNFINISHED may still become a character."""
        before = self._text.decode(self._context)
        if self.open:
            before = before.removesuffix(UNFINISHED)
        self._context += ids
        after = self._text.decode(self._context)
        self._context = self._context[1 - MAX_CHARACTER_BYTES :]
        self.open = not ended and after.endswith(UNFINISHED)
        return (after.removesuffix(UNFINISHED) if self.open else after)[len(before) :]


class TextStream:
    """Gives generated tokens their text, and hands each out in order once its text is certain.

    A token's text is what it adds to the decoded text; a character of several tokens belongs to the last of them. The
    texts of all tokens together are `text.decode` of all ids, cut before the first stop string. `stopped`: there was
    one. A stop string that names special tokens is also looked for where they are spelled out, since they have no text.
    """

    def __init__(self, text: Text | None, stop: str | Sequence[str] = ()):
        """Without a tokenizer all texts are empty.

        Raises InputError for an empty stop string, and for any without a tokenizer.
        """
        given: object = stop
        if not isinstance(given, Iterable):
            raise InputError(f"stop is {shown(given)}, expected a str or a list of them.")
        self._stops = (stop,) if isinstance(stop, str) else tuple(stop)
        for string in self._stops:
            if not isinstance(string, str) or not string:
                raise InputError(f"The stop string {shown(string)} is not a str of at least one character: leave it out.")
        if self._stops and text is None:
            raise InputError(
                "Stop strings need the bundle's tokenizer.json, which it lacks: leave them out, or add a tokenizer and export again."
            )
        self.stopped = False
        special = {} if text is None else text.special
        self._naming = tuple(string for string in self._stops if any(name in string for name in special.values()))
        self._spelling = special if self._naming else {}
        self._detokeniser = _Detokeniser(text) if text is not None else None
        self._held: list[Token] = []
        self._pieces: list[str] = []  # texts of the first held tokens

    def push(self, token: Token) -> list[Token]:
        """Add a token; returns the tokens whose text is now certain.

        Once `stopped`, tokens come back at once, without text.
        """
        if self._detokeniser is None or self.stopped:
            token.text = ""
            return [token]
        self._held.append(token)
        if self._spelling.get(token.id) in self._stops:
            self._end_characters()
            self._pieces.append("")
        else:
            self._pieces += self._detokeniser.push(token.id)
        return self._release(final=False)

    def finish(self) -> list[Token]:
        """The text ends here: returns the tokens that were held back."""
        if self._detokeniser is None or not self._held:
            return []
        self._end_characters()
        return self._release(final=True)

    def _end_characters(self) -> None:
        """No byte comes any more for characters that are not finished."""
        assert self._detokeniser is not None
        self._pieces += self._detokeniser.finish()
        if self._detokeniser.open:
            self._pieces[-1] += UNFINISHED
            self._detokeniser.open = False

    def _release(self, *, final: bool) -> list[Token]:
        """Places are those of the text with special tokens spelled out, where a stop string names any."""
        spelled = [self._spelling.get(token.id, piece) for token, piece in zip(self._held, self._pieces, strict=False)]
        end_of_all = sum(map(len, spelled))
        match, partial = self._search(spelled, end_of_all)
        if match < end_of_all and (final or match <= partial):
            self.stopped = True
            return self._hand_out(len(self._held), self._text_before(match, spelled))
        if final:
            return self._hand_out(len(self._held), sum(map(len, self._pieces)))
        # Inside a character, the tokens that may belong to it wait too: at most three, even if it never ends.
        complete = len(self._pieces) - (MAX_CHARACTER_BYTES - 1 if self._detokeniser is not None and self._detokeniser.open else 0)
        count = end = 0
        for piece in spelled[: max(complete, 0)]:
            end += len(piece)
            if end > partial:
                break
            count += 1
        return self._hand_out(count, self._text_before(partial, spelled))

    def _search(self, spelled: list[str], end: int) -> tuple[int, int]:
        """Where the first stop string starts, and where the text's end may begin another; `end`: nowhere.

        If one may still begin earlier, the text waits for it. So the result does not depend on how text is split into
        tokens.
        """
        text, with_special = "".join(self._pieces), "".join(spelled)
        matches = [self._place(match, spelled) for match in met(text, self._stops)] + met(with_special, self._naming)
        tails = [self._place(tail, spelled) for tail in begun(text, self._stops)] + begun(with_special, self._naming)
        return min(matches, default=end), min(tails, default=end)

    def _place(self, place: int, spelled: list[str]) -> int:
        """A place in the text, in the text with special tokens spelled out."""
        start = 0
        for piece, written in zip(self._pieces, spelled, strict=True):
            if place < len(piece):
                break
            place -= len(piece)
            start += len(written)
        return start + place

    def _text_before(self, place: int, spelled: list[str]) -> int:
        """Characters of text before a place in the text with special tokens spelled out."""
        count = 0
        for piece, written in zip(self._pieces, spelled, strict=True):
            count += min(len(piece), max(place, 0))
            place -= len(written)
        return count

    def _hand_out(self, count: int, end: int) -> list[Token]:
        """The first held tokens, with their texts up to the character `end` of the held text."""
        tokens = self._held[:count]
        for token, piece in zip_longest(tokens, self._pieces[:count], fillvalue=""):
            assert isinstance(token, Token)  # there are never more pieces than tokens
            token.text = piece[: max(end, 0)]
            end -= len(piece)
        del self._held[:count], self._pieces[:count]
        return tokens
