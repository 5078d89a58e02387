"""Prompt lookup decoding: drafts are the tokens that followed the newest n-gram when it last occurred."""

from collections.abc import Sequence

MAX_NGRAM, MIN_NGRAM = 4, 2  # tokens that must match


class Lookup:
    """An index of the n-grams of one text that only grows; a token costs a dictionary entry per length."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram → position behind its latest occurrence
        self._indexed = 1  # n-grams that end before this position are indexed

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` drafts: the tokens behind the latest occurrence of the longest n-gram that ends the text."""
        for end in range(self._indexed, len(tokens)):  # not those that end the text: nothing follows yet
            for size in range(MIN_NGRAM, min(MAX_NGRAM, end) + 1):
                self._after[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens))
        for size in range(min(MAX_NGRAM, len(tokens)), MIN_NGRAM - 1, -1):
            start = self._after.get(tuple(tokens[-size:]))
            if start is not None:
                period = len(tokens) - start  # a text that repeats itself goes on doing so
                return [tokens[start + ahead % period] for ahead in range(most)]
        return []
