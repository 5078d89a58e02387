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
# (ids [S], chunk) → fused logits float32 [S, V], experts int64 [S]
Score = Callable[[Sequence[int], int], tuple[np.ndarray, np.ndarray]]


def sequences(system: System, prompts: Sequence[str], tokens: int = TOKENS) -> list[list[int]]:
    """Token ids to compare on, at most `tokens`: the prompts end to end, cut into sequences. Without a tokenizer: seeded
    random ids.
    """
    length = min(LONGEST, system.max_seq_len)
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
    decoded: int | None = None,
) -> dict[str, Any]:
    """Compare a precision for the CPU through the runtime that users run; see `compare_scores`."""
    with FusionRuntime.load(bundle, precision=precision, device="cpu") as runtime:

        def score(ids: Sequence[int], chunk: int) -> tuple[np.ndarray, np.ndarray]:
            scores = runtime.score(ids, chunk=chunk)
            return scores.logits, scores.experts

        return compare_scores(score, texts, references, advance, decoded)


def compare_scores(
    score: Score,
    texts: Sequence[Sequence[int]],
    references: Sequence[Reference],
    advance: Callable[[float], None],
    decoded: int | None = None,
) -> dict[str, Any]:
    """Differences of the fused distribution (see `metrics.summarise`), read in chunks and token by token ("decode").

    `references` belong to `texts`, one each. Token by token, texts are read until `decoded` tokens are reached; None
    means all. `largest_logit` is the largest |logit| of the reference: the scale of the differences between logits.
    """
    result: dict[str, Any] = {"tokens": sum(map(len, texts))}
    for name, chunk, limit in (("chunks", LONGEST, None), ("decode", 1, decoded)):
        parts: list[Differences] = []
        for ids, expected in zip(texts, references, strict=True):
            if limit is not None and sum(len(part.kl) for part in parts) >= limit:
                break
            logits, experts = score(ids, chunk)
            parts.append(differences(logits, expected.logits, experts, expected.experts, ids))
            advance(len(ids))
        result[name] = summarise(parts)
    result["largest_logit"] = max(float(np.abs(expected.logits).max()) for expected in references)
    return result
