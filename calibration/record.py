"""Record what the exported system generates: texts, and which expert chose each token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.errors import InputError

NOBODY = -1


@dataclass(frozen=True)
class RecordedText:
    """A prompt with the system's continuation, its end-of-sequence token included.

    ids int32 [S]. experts int8 [S]: the index of the expert that chose token t + 1; NOBODY where none was chosen, which
    is at all positions of the prompt except the last one, and at the last token.
    """

    ids: npt.NDArray[np.int32]
    experts: npt.NDArray[np.int8]


def record(
    runtime: FusionRuntime, prompts: Sequence[str | Sequence[int]], new_tokens: int, seed: int, advance: Callable[[float], None]
) -> list[RecordedText]:
    """One text per prompt, sampled at temperature 1 and top_p 0.95, since greedy texts loop.

    A prompt that leaves no room for `new_tokens` in the context is cut at its end. Each prompt has a random stream of
    its own, so its text does not depend on the other prompts. `advance` is called with 1 after every text. Raises
    InputError for an empty prompt, and where `new_tokens` leaves no room for a prompt.
    """
    if not 1 <= new_tokens < runtime.max_seq_len:
        raise InputError(
            f"{new_tokens} new tokens per prompt are out of range: expected 1 to {runtime.max_seq_len - 1}, "
            f"since a prompt stands before them in the context of {runtime.max_seq_len}."
        )
    eos = frozenset(runtime.bundle.manifest.eos_token_ids)
    session = runtime.session()
    texts = []
    for number, prompt in enumerate(prompts):
        ids = list(runtime.prompt_ids(prompt))[: runtime.max_seq_len - new_tokens]
        session.rewind(0)
        session.append(ids)
        experts = [NOBODY] * (len(ids) - 1)
        for _ in range(new_tokens):
            token = session.step(temperature=1.0, top_p=0.95, seed=seed + number)
            experts.append(runtime.expert_names.index(token.expert))
            if token.id in eos:
                break
        texts.append(RecordedText(np.array(session.token_ids, np.int32), np.array([*experts, NOBODY], np.int8)))
        advance(1)
    return texts
