"""Compare an exported bundle with the reference."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.verify.metrics import Differences, differences, summarise
from fusionroute.fr_export.verify.torch_reference import Reference
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.text import Text

TOKENS = 384  # compared positions: enough to notice a wrong graph, cheap enough for every export
LONGEST = 128  # tokens of one sequence, and of a chunk
DECODED = 32  # tokens, at the ends of all sequences, that are also read one by one
# (ids [S], alone) → fused logits float32 [P, V], experts int64 [P]: at every position, read in chunks (alone = 0), or at
# the last `alone` positions, whose tokens are read one by one behind the others
Score = Callable[[Sequence[int], int], tuple[np.ndarray, np.ndarray]]


def sequences(system: System, prompts: Sequence[str], tokens: int = TOKENS) -> list[list[int]]:
    """Token ids to compare on, at most `tokens`: the prompts end to end, cut into sequences. Without a tokenizer: seeded
    random ids.
    """
    length = min(LONGEST, system.max_seq_len - 1)  # a step leaves room for the token that it chooses
    tokenizer_file = system.router.file("tokenizer.json")
    if tokenizer_file is None:
        draw = [int(i) for i in np.random.default_rng(0).integers(0, system.vocab_size, min(tokens, 2 * length))]
        return [draw[start : start + length] for start in range(0, len(draw), length)]
    text = Text.load(tokenizer_file)  # as the runtime encodes
    ids = [i for prompt in prompts for i in text.encode(prompt)][:tokens]
    return [ids[start : start + length] for start in range(0, len(ids), length)]


def compare(
    bundle: str,
    precision: str,
    texts: Sequence[Sequence[int]],
    references: Sequence[Reference],
    advance: Callable[[float], None],
    decoded: int = DECODED,
) -> dict[str, Any]:
    """Compare a precision for the CPU through the runtime that users run; see `compare_scores`."""
    with FusionRuntime.load(bundle, precision=precision, device="cpu", prefix_cache=0) as runtime:
        return compare_scores(scorer(runtime), texts, references, advance, decoded)


def scorer(runtime: FusionRuntime) -> Score:
    """How a runtime scores texts."""
    session = runtime.session()

    def score(ids: Sequence[int], alone: int) -> tuple[np.ndarray, np.ndarray]:
        if not alone:
            scores = runtime.score(ids, chunk=LONGEST)
            return scores.logits, scores.experts
        session.rewind(0)
        session.append(ids[: len(ids) - alone])
        rows, experts = [], []
        for token in ids[len(ids) - alone :]:
            session.append([token])
            experts.append(runtime.expert_names.index(session.step().expert))
            rows.append(session.logits)
            session.rewind(len(session) - 1)  # forgets what the step chose
        return np.stack(rows), np.array(experts)

    return score


def compare_scores(
    score: Score,
    texts: Sequence[Sequence[int]],
    references: Sequence[Reference],
    advance: Callable[[float], None],
    decoded: int = DECODED,
) -> dict[str, Any]:
    """Differences of the fused distribution (see `metrics.summarise`) over all positions: in "chunks", and in "decode",
    where the last tokens of each text, `decoded` in all, are read one by one.

    `references` belong to `texts`, one each. `largest_logit` is the largest |logit| of the reference: the scale of the
    differences between logits.
    """
    total = sum(map(len, texts))
    chunks: list[Differences] = []
    decode: list[Differences] = []
    for ids, expected in zip(texts, references, strict=True):
        alone = min(len(ids), -(-decoded * len(ids) // total))
        chunks.append(differences(*score(ids, 0), expected, ids))
        advance(len(ids))
        if alone:
            tail = Reference(expected.logits[-alone:], expected.routing[-alone:], expected.experts[-alone:])
            decode.append(chunks[-1].ending(differences(*score(ids, alone), tail, ids[-alone:])))
            advance(alone)
    largest = max(float(np.abs(expected.logits).max()) for expected in references)
    return {
        "tokens": total,
        "chunks": summarise(chunks),
        "decode": summarise(decode or chunks),
        "largest_logit": largest,
    }
