"""Neighbouring texts that are read together."""

from collections.abc import Iterator, Sequence


def gathered(lengths: Sequence[int], tokens: int) -> Iterator[range]:
    """Runs of neighbouring texts that have at least so many tokens, the last one perhaps fewer."""
    start = total = 0
    for number, length in enumerate(lengths):
        total += length
        if total >= tokens:
            yield range(start, number + 1)
            start, total = number + 1, 0
    if start < len(lengths):
        yield range(start, len(lengths))
