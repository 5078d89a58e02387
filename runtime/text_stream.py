"""A stream that gives each token its text: whole characters only, up to a stop string."""

import codecs
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest

from fusionroute.runtime.arguments import shown
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.stop_strings import begun, met
from fusionroute.runtime.text import Text, Token

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # decoders write it for bytes that are not, or not yet, a character
MAX_CHARACTER_BYTES = 4  # of UTF-8


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


class LateTexts:
    """The texts of a session's tokens, which are decoded when somebody asks for one of them or of a later one."""

    def __init__(self, text: Text | None):
        """Without a tokenizer all texts are empty."""
        self._stream = None if text is None else TextStream(text)
        self._ids: list[int] = []
        self._texts: list[str] = []  # of the first of them

    def text_of(self, id: int) -> str | Callable[[], str]:
        """What becomes certain with the next token; a function that decodes it."""
        if self._stream is None:
            return ""
        self._ids.append(id)
        return partial(self._text, len(self._ids) - 1)

    def _text(self, number: int) -> str:
        assert self._stream is not None
        while len(self._texts) <= number:
            token = Token(self._ids[len(self._texts)], "", 0.0, [])
            self._texts.append("".join(ready.text for ready in self._stream.push(token)))
        return self._texts[number]
