"""The shapes that engines are built for: one profile for all chunk lengths, so one engine per model."""

from __future__ import annotations

from fusionroute.runtime import limits
from fusionroute.runtime.limits import EXPERT
from fusionroute.runtime.manifest import Manifest, Profile

# tokens that the fusion engine returns for a position; sampling from more of them reads the full row
MOST_CANDIDATES = 512
TOPK_LIMIT = 3840  # TensorRT's TopK takes fewer

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # smallest, usual, largest


def profile_of(manifest: Manifest) -> Profile:
    """What the engines of a bundle are built for: chunks of up to CHUNK tokens, and all of its context."""
    chunk = min(limits.CHUNK, manifest.max_seq_len)
    return Profile(
        tokens=chunk,
        keys=manifest.max_seq_len,
        positions=chunk,
        rows=max(1, min(chunk, limits.FUSED // manifest.vocab_size)),
        candidates=min(MOST_CANDIDATES, manifest.vocab_size, TOPK_LIMIT - 1),
        penalised=manifest.max_seq_len,
    )


def shapes(profile: Profile, vocab: int) -> dict[str, Shapes]:
    """Smallest, usual (a decoding step) and largest shape of every free input of the models and of the fusion graph.

    Those of a pair's expert are as its router's.
    """
    model: dict[str, Shapes] = {
        "input_ids": ((1, 1), (1, 1), (1, profile.tokens)),
        "key_positions": ((1,), ((profile.keys + 1) // 2,), (profile.keys,)),
        "logit_positions": ((1,), (1,), (profile.positions,)),
    }
    return {
        **model,
        **{f"{EXPERT}{name}": sizes for name, sizes in model.items()},
        "router_logits": ((1, vocab), (1, vocab), (profile.rows, vocab)),
        "expert_logits": ((1, vocab), (1, vocab), (profile.rows, vocab)),
        "penalty_ids": ((1, 0), (1, 0), (profile.rows, profile.penalised)),
        "k": ((1,), (1,), (profile.candidates,)),
    }
