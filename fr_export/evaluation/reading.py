"""Each model's outputs after each prefix of a text, computed once for all methods."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from fusionroute.runtime.backend import LanguageModel, Output
from fusionroute.runtime.limits import FUSED

Ids = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Place:
    """A prefix of a text as one model has read it: the chunk that ends here, after the chunks of its parents.

    Kernels round one token differently from several, so the same prefix read in other chunks is another place.
    """

    parent: Place | None
    ids: Ids
    length: int
    following: dict[Ids, Place] = field(default_factory=dict)
    # logits [V], routing [n_experts] of a router; None: not computed yet, or dropped to save memory
    output: Output | None = None


class TextReader:
    """One model, which reads one prompt at a time. All methods read through it, so no model computes a prefix twice.

    With `guessing` a whole answer may be read ahead in one pass, which rounds differently from reading token by token:
    in the last bits in fp32, visibly in int8.
    """

    def __init__(self, model: LanguageModel, vocab_size: int, chunk: int, guessing: bool):
        self._chunk = chunk
        self._cache = model.cache()
        self._room = max(64, FUSED // vocab_size)  # number of outputs that stay in memory
        self._guessing = guessing
        self._with_output: deque[Place] = deque()
        self.start((), ())

    def start(self, prompt: Ids, guess: Ids) -> None:
        """Begin a new text. `guess` is an answer that some method is likely to give."""
        while self._with_output:  # places refer to each other: their rows would stay until garbage collection
            self._with_output.pop().output = None
        self.root = self._cached = Place(None, (), 0)  # _cached: the place that the KV cache is at
        self._prompt = prompt
        self._guess = guess[: self._room - 1] if self._guessing and len(prompt) + len(guess) <= self._chunk else ()

    def read(self, place: Place, ids: Ids) -> tuple[Place, Output]:
        """The place after `ids` (at least one) and the model's output there.

        Chunks are those of the runtime's sessions.
        """
        if self._guess:
            if not self.root.following:
                self._read_ahead()
            while following := place.following.get(ids[: 1 if place.length else len(self._prompt)]):
                place, ids = following, ids[len(following.ids) :]
        while ids:
            chunk, ids = ids[: self._chunk], ids[self._chunk :]
            if chunk not in place.following:
                place.following[chunk] = Place(place, chunk, place.length + len(chunk))
            place = place.following[chunk]
        return place, place.output or self._run(place)

    def _run(self, place: Place) -> Output:
        """Let the model read up to a place, from its last common prefix with the cached text on."""
        missing = [place]
        assert place.parent is not None
        place = place.parent
        if place is not self._cached:
            cached = _prefixes(self._cached)
            while place not in cached:
                missing.append(place)
                assert place.parent is not None
                place = place.parent
        self._cache.length = place.length
        for place in reversed(missing):
            logits, routing = self._cache.forward(place.ids, (len(place.ids) - 1,))
            output = Output(logits[0].copy(), None if routing is None else routing[0].copy())
            self._store(place, output)
        self._cached = place
        return output

    def _read_ahead(self) -> None:
        """Read prompt and guess in one pass. The outputs go to the places that reading token by token would reach."""
        self._cache.length = 0
        positions = range(len(self._prompt) - 1, len(self._prompt) + len(self._guess))
        logits, routing = self._cache.forward((*self._prompt, *self._guess), positions)
        for row, ids in enumerate((self._prompt, *((token,) for token in self._guess))):
            place = self._cached.following[ids] = Place(self._cached, ids, self._cached.length + len(ids))
            self._store(place, Output(logits[row].copy(), None if routing is None else routing[row].copy()))
            self._cached = place

    def _store(self, place: Place, output: Output) -> None:
        place.output = output
        self._with_output.append(place)
        if len(self._with_output) > self._room:
            self._with_output.popleft().output = None


def _prefixes(place: Place | None) -> set[Place]:
    prefixes = set()
    while place is not None:
        prefixes.add(place)
        place = place.parent
    return prefixes
