"""A generation: the rules of one text, and the loop of steps until it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from fusionroute.runtime.cancellation import Cancellation, Interrupted
from fusionroute.runtime.decoder import Decoder
from fusionroute.runtime.limits import MAX_ROUND_TOKENS
from fusionroute.runtime.sampling import Sampler
from fusionroute.runtime.stream import End
from fusionroute.runtime.text import Token
from fusionroute.runtime.text_stream import TextStream


@dataclass(frozen=True)
class Generation:
    """The rules of one text.

    `coefficients`: weights of router and expert logits. `pinned`: index of the expert that answers every token, None
    for the routed one. `ends`: tokens that end the text, and are not part of it. `limit`: tokens at most. `drafts`:
    whether speculation may draft.
    """

    sampler: Sampler
    coefficients: tuple[float, float]
    pinned: int | None
    text: TextStream
    ends: frozenset[int]
    limit: int
    cancellation: Cancellation
    drafts: bool = True

    def tokens(self, decoder: Decoder) -> Iterator[Token | End]:
        """Tokens behind the appended prompt, as their text becomes certain; then the reason for the end.

        Raises ClosedError after the runtime was closed.
        """
        decoder.sequence.cancellation = self.cancellation
        reason = "length"
        ready: deque[Token] = deque()
        whole_rounds = self.sampler.sampling.temperature > 0  # a round that the limit cuts short would draw other random numbers
        try:
            for left in range(self.limit, 0, -1):
                self.cancellation.check()
                if not ready and decoder.step.complete(self.sampler):
                    reason = "stop"
                    break
                if not ready:
                    most = (MAX_ROUND_TOKENS if whole_rounds else left) if self.drafts else 1
                    ready.extend(decoder.advance_some(self.sampler, self.coefficients, self.pinned, most))
                token = ready.popleft()
                if token.id in self.ends:
                    reason = "stop"
                    break
                yield from self.text.push(token)
                if self.text.stopped:
                    break
        except Interrupted:
            reason = self.cancellation.reason or "cancelled"
        yield from self.text.finish()
        yield End("stop" if self.text.stopped else reason, decoder.drafted, decoder.accepted)
