"""The loop of a generation: steps until the text ends, and why it ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from fusionroute.runtime.cancellation import Cancellation, Interrupted
from fusionroute.runtime.decoder import Decoder
from fusionroute.runtime.limits import MAX_ROUND_TOKENS
from fusionroute.runtime.sampling import Sampler
from fusionroute.runtime.stream import End
from fusionroute.runtime.text import Token
from fusionroute.runtime.text_stream import TextStream


def generate_tokens(
    decoder: Decoder,
    sampler: Sampler,
    coefficients: tuple[float, float],
    pinned: int | None,
    text: TextStream,
    ends: frozenset[int],
    limit: int,
    cancellation: Cancellation,
    drafts: bool = True,
) -> Iterator[Token | End]:
    """At most `limit` tokens behind the appended prompt, as their text becomes certain; then the reason for the end.

    `ends`: tokens that end the text, and are not part of it. `drafts`: whether speculation may draft.

    Raises ClosedError after the runtime was closed.
    """
    decoder.sequence.cancellation = cancellation
    reason = "length"
    ready: deque[Token] = deque()
    whole_rounds = sampler.sampling.temperature > 0  # a round that the limit cuts short would draw other random numbers
    try:
        for left in range(limit, 0, -1):
            cancellation.check()
            if not ready and decoder.step.complete(sampler):
                reason = "stop"
                break
            if not ready:
                most = (MAX_ROUND_TOKENS if whole_rounds else left) if drafts else 1
                ready.extend(decoder.advance_some(sampler, coefficients, pinned, most))
            token = ready.popleft()
            if token.id in ends:
                reason = "stop"
                break
            yield from text.push(token)
            if text.stopped:
                break
    except Interrupted:
        reason = cancellation.reason or "cancelled"
    yield from text.finish()
    yield End("stop" if text.stopped else reason, decoder.drafted, decoder.accepted)
