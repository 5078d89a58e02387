"""Record what the exported system generates: texts, and which expert chose each token."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from fusionroute.calibration.side_by_side import Floats, SideBySide
from fusionroute.runtime.sampling import DEFAULT_CANDIDATES, Candidates, Sampler, Sampling

NOBODY = -1


@dataclass(frozen=True)
class RecordedText:
    """A prompt with the system's continuation, its end-of-sequence token included.

    ids int32 [S]. experts int8 [S]: the index of the expert that chose token t + 1; NOBODY where none was chosen, which
    is at all positions of the prompt except the last one, and at the last token.
    """

    ids: npt.NDArray[np.int32]
    experts: npt.NDArray[np.int8]


@dataclass
class Growing:
    """A text that is being generated. The models have read all of its tokens but the last."""

    number: int
    ids: list[int]
    sampler: Sampler
    prompt: int
    experts: list[int] = field(default_factory=list)

    def finished(self) -> RecordedText:
        """The text when it has ended."""
        experts = [NOBODY] * (self.prompt - 1) + self.experts + [NOBODY]
        return RecordedText(np.array(self.ids, np.int32), np.array(experts, np.int8))


def record(
    models: SideBySide,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: frozenset[int],
    coefficients: tuple[float, float],
    seed: int,
) -> Iterator[RecordedText]:
    """One text per prompt, in their order, sampled at temperature 1 and top_p 0.95, since greedy texts loop.

    A text has `new_tokens` more tokens than its prompt [at least 1 token], or fewer where one of `ends` comes.
    `coefficients` weight the router's logits and the expert's. Each prompt has a random stream of its own, so its text
    does not depend on the other prompts, though as many are read side by side as `models` has rows.
    """
    waiting = deque(
        Growing(number, list(ids), Sampler(Sampling(temperature=1.0, top_p=0.95, seed=seed + number)), len(ids))
        for number, ids in enumerate(prompts)
    )
    rows: list[Growing | None] = [None] * models.rows
    done: dict[int, RecordedText] = {}
    following = 0
    while following < len(prompts):
        for row, text in enumerate(rows):
            if text is None and waiting:
                rows[row] = text = waiting.popleft()
                if beginning := text.ids[:-1]:
                    models.begin(row, beginning)
        tokens = np.array([text.ids[-1] if text else 0 for text in rows], np.int64)
        lengths = np.array([len(text.ids) - 1 if text else 0 for text in rows], np.int32)
        (router, routing), *experts = models.read(tokens, lengths)
        for row, text in enumerate(rows):
            if text is None:
                continue
            expert = int(routing[row].argmax())
            fused = coefficients[0] * router[row] + coefficients[1] * experts[expert][0][row]
            text.experts.append(expert)
            text.ids.append(text.sampler.choose(candidates(fused), partial(np.asarray, fused)))
            if text.ids[-1] in ends or len(text.experts) == new_tokens:
                done[text.number], rows[row] = text.finished(), None
        while following in done:
            yield done.pop(following)
            following += 1


def candidates(logits: Floats) -> Candidates:
    """The largest logits of a row [V], the lower id first among equals."""
    count = min(DEFAULT_CANDIDATES, len(logits))
    ids = np.argpartition(logits, -count)[-count:]
    ids = ids[np.lexsort((ids, -logits[ids]))]
    largest = float(logits[ids[0]])
    return Candidates(ids, logits[ids], largest + float(np.log(np.exp(logits - largest, dtype=np.float64).sum())))
