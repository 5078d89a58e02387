"""What rounding does to the fused distribution at every position of a text, against a reference."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from fusionroute.fr_export.verify.torch_reference import Reference

SURE = 1.0  # logits between the reference's best token and its second best
ROWS = 64  # positions at a time: a row of a large vocabulary takes 2 MB in double precision


@dataclass(frozen=True)
class Differences:
    """Arrays [S] over positions. Where the text ends there is no next token: `nll` and `reference_nll` are NaN there.

    peak, mean: |Δ logit|. kl: KL(reference‖measured) in nats. same: equal most likely token. margin: between the
    reference's best two tokens, in logits. routed: equal choice of expert. nll: −log p(next token of the text).
    """

    peak: np.ndarray
    mean: np.ndarray
    kl: np.ndarray
    same: np.ndarray
    margin: np.ndarray
    routed: np.ndarray
    nll: np.ndarray
    reference_nll: np.ndarray

    def ending(self, tail: "Differences") -> "Differences":
        """These with other ones at the last positions."""
        start = len(self.kl) - len(tail.kl)
        return Differences(*(np.concatenate([getattr(self, each.name)[:start], getattr(tail, each.name)]) for each in fields(self)))


def differences(logits: np.ndarray, experts: np.ndarray, reference: Reference, ids: Sequence[int]) -> Differences:
    """Compare fused logits float32 [S, V] and chosen experts [S] with the reference's. `ids` [S] is the text."""
    pieces = [
        _rows(logits[start : start + ROWS], reference.logits[start : start + ROWS], ids[start + 1 : start + ROWS + 1])
        for start in range(0, len(ids), ROWS)
    ]
    joined = [np.concatenate(column) for column in zip(*pieces, strict=True)]
    peak, mean, kl, same, margin, nll, reference_nll = joined
    return Differences(peak, mean, kl, same, margin, experts == reference.experts, nll, reference_nll)


def _rows(logits: np.ndarray, reference: np.ndarray, following: Sequence[int]) -> tuple[np.ndarray, ...]:
    gaps = np.abs(logits - reference)
    # Double precision: a divergence of 1e-7 is a difference of sums over up to 256,000 tokens.
    q, p = (_log_softmax(each.astype(np.float64)) for each in (logits, reference))
    top = np.partition(reference, -2, axis=-1)[:, -2:]
    nll = np.full((2, len(logits)), np.nan)
    for row, (token, line) in enumerate(zip(following, zip(q, p, strict=True), strict=False)):
        nll[:, row] = -line[0][token], -line[1][token]
    kl = (np.exp(p) * (p - q)).sum(-1)
    return gaps.max(-1), gaps.mean(-1), kl, logits.argmax(-1) == reference.argmax(-1), top[:, 1] - top[:, 0], nll[0], nll[1]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits


def summarise(parts: Sequence[Differences]) -> dict[str, float | int | None]:
    """The figures of one precision over all texts. Shares lie between 0 and 1. None: there was nothing to count.

    `perplexity_error` is the standard error of the ratio's logarithm: other texts of this length would move it so far.
    """
    every = Differences(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Differences)))
    sure = every.margin > SURE
    told = ~np.isnan(every.nll)
    perplexity, reference = (float(np.exp(nll[told].mean())) if told.any() else None for nll in (every.nll, every.reference_nll))
    gaps = every.nll[told] - every.reference_nll[told]
    return {
        "max_difference": float(every.peak.max()),
        "mean_difference": float(every.mean.mean()),
        "kl_mean": float(every.kl.mean()),
        "kl_p99": float(np.quantile(every.kl, 0.99)),
        "greedy_agreement": float(every.same.mean()),
        "sure_positions": int(sure.sum()),
        "sure_agreement": float(every.same[sure].mean()) if sure.any() else None,
        "routing_agreement": float(every.routed.mean()),
        "perplexity": perplexity,
        "perplexity_ratio": perplexity / reference if perplexity is not None and reference is not None else None,
        "perplexity_error": float(gaps.std(ddof=1) / len(gaps) ** 0.5) if len(gaps) > 1 else None,
    }
