"""What each model says after each beginning of a text, computed once for all methods that ask."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from fusionroute.runtime.backend import LanguageModel, Output
from fusionroute.runtime.limits import FUSED

Ids = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Place:
    """A beginning of a text as one model reads it: the chunk that ends here, behind those of its parents.

    Kernels round one token and several differently, so what is read in other chunks is another place.
    """

    parent: Place | None
    ids: Ids
    length: int
    following: dict[Ids, Place] = field(default_factory=dict)
    output: Output | None = None  # logits [V], routing [n_experts] of a router; None: not read yet, or dropped to save memory


class Reader:
    """One model and one prompt at a time. All methods read through it, so that no model reads a beginning twice.

    With `guessing` a whole answer may be read ahead in one pass. One pass rounds differently than token by token: in the last bits
    of fp32, visibly in int8.
    """

    def __init__(self, model: LanguageModel, vocab_size: int, chunk: int, guessing: bool):
        self._chunk = chunk
        self._cache = model.cache()
        self._room = max(64, FUSED // vocab_size)  # rows of logits that are kept
        self._guessing = guessing
        self._kept: deque[Place] = deque()
        self.start((), ())

    def start(self, prompt: Ids, guess: Ids) -> None:
        """Begin a new text. `guess` is an answer that some method may well give."""
        while self._kept:  # places hold each other: their rows would stay until the garbage collector comes by
            self._kept.pop().output = None
        self.root = self._held = Place(None, (), 0)  # _held: what the KV cache holds
        self._prompt = prompt
        self._guess = guess[: self._room - 1] if self._guessing and len(prompt) + len(guess) <= self._chunk else ()

    def read(self, place: Place, ids: Ids) -> tuple[Place, Output]:
        """The place after `ids` (at least one) and the model's output there. Ids are read in chunks as the runtime's sessions do."""
        if self._guess:
            if not self.root.following:
                self._read_ahead()
            while known := place.following.get(ids[: 1 if place.length else len(self._prompt)]):
                place, ids = known, ids[len(known.ids) :]
        while ids:
            chunk, ids = ids[: self._chunk], ids[self._chunk :]
            if chunk not in place.following:
                place.following[chunk] = Place(place, chunk, place.length + len(chunk))
            place = place.following[chunk]
        return place, place.output or self._run(place)

    def _run(self, place: Place) -> Output:
        """Let the model read up to a place, from where the cache's text and the way there part."""
        missing = [place]
        assert place.parent is not None
        place = place.parent
        if place is not self._held:
            held = _beginnings(self._held)
            while place not in held:
                missing.append(place)
                assert place.parent is not None
                place = place.parent
        self._cache.length = place.length
        for place in reversed(missing):
            logits, routing = self._cache.forward(place.ids, (len(place.ids) - 1,))
            output = Output(logits[0].copy(), None if routing is None else routing[0].copy())
            self._keep(place, output)
        self._held = place
        return output

    def _read_ahead(self) -> None:
        """Read prompt and guess in one pass; the outputs are put down to the places of reading token by token."""
        self._cache.length = 0
        wanted = range(len(self._prompt) - 1, len(self._prompt) + len(self._guess))
        logits, routing = self._cache.forward((*self._prompt, *self._guess), wanted)
        for row, ids in enumerate((self._prompt, *((token,) for token in self._guess))):
            place = self._held.following[ids] = Place(self._held, ids, self._held.length + len(ids))
            self._keep(place, Output(logits[row].copy(), None if routing is None else routing[row].copy()))
            self._held = place

    def _keep(self, place: Place, output: Output) -> None:
        place.output = output
        self._kept.append(place)
        if len(self._kept) > self._room:
            self._kept.popleft().output = None


def _beginnings(place: Place | None) -> set[Place]:
    found = set()
    while place is not None:
        found.add(place)
        place = place.parent
    return found
