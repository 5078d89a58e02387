"""Grammars to matchers of a bundle's tokens, with llguidance."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fusionroute.runtime.arguments import shown
from fusionroute.runtime.errors import InputError, UnavailableError, one_line
from fusionroute.runtime.grammar import Grammar
from fusionroute.runtime.grammar_masks import GrammarMasks
from fusionroute.runtime.text import Text

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_COMPILED = 16  # grammars that are kept
WHITESPACE = r"[ ]|\n[ ]{0,32}"  # between two tokens of JSON, where there is any
NAMES = {"json_schema": "JSON schema", "regex": "expression", "lark": "grammar"}


class GrammarCompiler:
    """The grammars of one bundle. Thread safe; llguidance is imported, and reads the tokenizer, at the first grammar."""

    def __init__(self, tokenizer: Text | None, vocab: int, eos: Iterable[int]):
        self._text, self._vocab, self._eos = tokenizer, vocab, list(eos)
        self._tokenizer: LLTokenizer | None = None
        self._matchers: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def masks(self, grammar: Grammar) -> GrammarMasks:
        """The masks of one text. Raises InputError for a grammar that is wrong, UnavailableError where there can be none."""
        given: object = grammar
        if not isinstance(given, Grammar):
            raise InputError(f"grammar is {shown(given)}, expected a Grammar, such as Grammar.json_schema(…).")
        with self._lock:
            matcher = self._matchers.get(grammar)
            if matcher is None and self._tokenizer is None:
                self._tokenizer = self._read_tokenizer()
        if matcher is None:
            matcher = self._compiled(grammar)  # this may take a second: others do not wait for it
        with self._lock:
            self._matchers[grammar] = matcher
            self._matchers.move_to_end(grammar)
            if len(self._matchers) > MOST_COMPILED:
                self._matchers.popitem(last=False)
            return GrammarMasks(matcher.deep_copy(), self._vocab)

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        assert self._tokenizer is not None
        try:  # errors that are not verbose do not repeat the grammar
            matcher = LLMatcher(self._tokenizer, _source(LLMatcher, grammar), log_level=0, limits=LLParserLimits(verbose_errors=False))
            fault = matcher.get_error()
        except BaseException as error:
            fault = _fault(error)
        if fault:
            raise InputError(f"The {NAMES[grammar.kind]} is refused: {_first_sentence(fault)}.")
        return matcher

    def _read_tokenizer(self) -> LLTokenizer:
        if self._text is None:
            raise UnavailableError("A grammar needs the bundle's tokenizer.json, which it lacks: leave it out, or add a tokenizer.")
        if not self._eos:
            raise UnavailableError("A grammar needs an end-of-sequence token, and the bundle names none: leave it out.")
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise UnavailableError("A grammar needs the package 'llguidance': pip install 'fusionroute[grammar]'.") from error
        try:
            return LLTokenizer(self._text.json(), n_vocab=self._vocab, eos_token=self._eos)
        except BaseException as error:
            raise UnavailableError(f"llguidance cannot read the bundle's tokenizer ({_fault(error)}): leave the grammar out.") from error


def _source(matcher: Any, grammar: Grammar) -> str:
    """A grammar in llguidance's own format."""
    if grammar.kind == "json_schema":
        return str(matcher.grammar_from_json_schema(grammar.source, defaults={"whitespace_pattern": WHITESPACE}))
    return str(matcher.grammar_from_regex(grammar.source) if grammar.kind == "regex" else matcher.grammar_from_lark(grammar.source))


def _fault(error: BaseException) -> str:
    """What an error of the native library says. Raises others, as Ctrl-C, again."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # no Exception, and has no name to import
        raise error
    return one_line(error)


def _first_sentence(fault: str) -> str:
    """An error of llguidance without the source, which it repeats, and advice for its own callers; on one line."""
    lines = [line for line in fault.partition(". Enable '")[0].splitlines() if line.strip(" ^|") and "|" not in line]
    return " ".join(" ".join(lines).split()).rstrip(".")
