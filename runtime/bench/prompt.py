"""The prompt of a benchmark: a given number of token ids."""

from __future__ import annotations

from itertools import cycle, islice

import numpy as np

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import InputError, UnavailableError
from fusionroute.runtime.prompt import tokenizer_of

DEFAULT = 64  # tokens, unless a text or a number is given
TEXT = (
    "The ferry leaves at 7:45 and takes 35 minutes. How many passengers can cross on one day if it sails 12 times and holds 180?\n"
    "def crossings(start, end, pause):\n    return [start + n * pause for n in range((end - start) // pause)]\n"
    "12*180=2160, so at most 2160 passengers; on Sundays it sails only 8 times. "
)


def prompt_ids(bundle: Bundle, text: str | None, tokens: int | None) -> list[int]:
    """Ids of a text, repeated or cut to so many tokens where a number is given; the built-in text stands for None.

    A bundle without a tokenizer gets seeded random ids. Raises UnavailableError where it has none for a given text.
    """
    manifest = bundle.manifest
    count = tokens if tokens is not None or text is not None else DEFAULT
    tokenizer = tokenizer_of(bundle)
    if tokenizer is None:
        if text is not None:
            raise UnavailableError(f"The bundle {bundle.folder} has no tokenizer.json: leave --prompt out, or give only --prompt-tokens.")
        return [int(id) for id in np.random.default_rng(0).integers(0, manifest.vocab_size, count)]
    chosen = TEXT if text is None else text
    ids, plain = tokenizer.encode(chosen), tokenizer.encode(chosen, special=False)
    if not ids or (count is not None and not plain):
        raise InputError("The prompt is empty: it needs at least one token.")
    return ids if count is None else list(islice([*ids, *islice(cycle(plain), count)], count))
