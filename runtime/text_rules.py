"""What one text must look like, and where it may end."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from fusionroute.runtime.arguments import flag, shown, whole, whole_numbers
from fusionroute.runtime.cancellation import Cancellation
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.grammar import Grammar
from fusionroute.runtime.grammar_compiler import GrammarCompiler
from fusionroute.runtime.sampling import Sampler, Sampling, sampler_of


@dataclass(frozen=True)
class TextRules:
    """A text ends before a stop string, at one of `stop_token_ids`, and at an end-of-sequence token unless `ignore_eos`.

    Such ids are not handed out. They are not chosen before there are `min_new_tokens`; stop strings end a text at any
    length. `grammar`: what the text must look like, its end included; a text that is cut at `max_new_tokens` may be the
    beginning of such a text.
    """

    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    grammar: Grammar | None = None

    def ends(self, eos: Iterable[int], vocab: int) -> frozenset[int]:
        """The tokens that end the text. Raises InputError for ids that are outside the vocabulary."""
        ids = whole_numbers(self.stop_token_ids, "stop_token_ids")
        if wrong := [id for id in ids if not 0 <= id < vocab]:
            raise InputError(f"Token id {shown(wrong[0])} of stop_token_ids is outside the vocabulary: expected 0 to {vocab - 1}.")
        return frozenset(ids) if flag("ignore_eos", self.ignore_eos) else frozenset((*eos, *ids))

    def sampler(
        self, sampling: Sampling, vocab: int, ends: Collection[int], grammars: GrammarCompiler, cancellation: Cancellation
    ) -> Sampler:
        """What chooses its tokens. Raises InputError, UnavailableError, and Interrupted while a grammar is compiled."""
        least, grammar = whole("min_new_tokens", self.min_new_tokens, 0), self.grammar
        if grammar is None:
            return sampler_of(sampling, vocab, ends, least)
        if self.ignore_eos:
            raise InputError("A grammar ends a text with an end-of-sequence token: leave out ignore_eos or the grammar.")
        return sampler_of(sampling, vocab, ends, least, cancellation.wait_for(lambda: grammars.masks(grammar)))


class RuleOptions(TypedDict, total=False):
    """The fields of `TextRules` as keyword arguments, for type checkers."""

    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_new_tokens: int
    grammar: Grammar | None
