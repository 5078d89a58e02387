"""The lexical class of each token of an answer, for the routing picture."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fusionroute.runtime.text import Text

CLASSES = ("digits", "operators", "code", "words", "marks", "layout")
"""Numbers; `+ - * / = < > %`; keywords of Python, brackets, and `,` or `:` after a number or bracket; letters; all
other
signs, such as quotes, braces and dashes in words; white space alone."""

_KEYWORDS = "and|class|def|else|False|for|if|import|in|is|lambda|len|list|max|min|None|not|or|print|range|return|sorted|sum|True|while"
_PATTERNS = {
    "digits": r"\d+",
    "code": rf"\b(?:{_KEYWORDS})\b|[()\[\]]|(?<=[\d)\]])[,:]",
    "words": r"[^\W\d_]+(?:[-'][^\W\d_]+)*|_+",
    "operators": r"[-+*/=<>%]+",
    "marks": r"[^\w\s]",
}
_LEXER = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _PATTERNS.items()))
_MARKS = {"-": "marks", "'": "marks"}  # within words


class TokenClasses:
    """The classes of token ids, in the context of their answer."""

    def __init__(self, text: Text):
        self._text = text
        self._anchor = text.encode("a", special=False)  # decoders may treat the first token specially
        self._before = len(text.decode(self._anchor))
        self._pieces: dict[int, str] = {}

    def of(self, ids: Sequence[int]) -> list[int]:
        """Index into CLASSES for each token id: the class of its first visible character."""
        pieces = [self._piece(id) for id in ids]
        text = "".join(pieces)
        character_classes = [CLASSES.index("layout")] * (len(text) + 1)
        for match in _LEXER.finditer(text):
            name = match.lastgroup or "marks"
            for place in range(*match.span()):
                character_classes[place] = CLASSES.index(_MARKS.get(text[place], name) if name == "words" else name)
        classes, start = [], 0
        for piece in pieces:
            first_visible = start + len(piece) - len(piece.lstrip())
            classes.append(character_classes[first_visible] if piece.strip() else CLASSES.index("layout"))
            start += len(piece)
        return classes

    def _piece(self, id: int) -> str:
        """The text that a token adds after another; the replacement sign where it is only part of a character."""
        if id not in self._pieces:
            self._pieces[id] = self._text.decode([*self._anchor, id])[self._before :]
        return self._pieces[id]
