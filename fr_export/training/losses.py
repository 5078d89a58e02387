"""The supervised loss of the FusionRoute paper (arXiv:2601.05106): L = L_LM + (1/3) · L_expert, as pure functions.

Shapes: B rows, S positions, V tokens of the vocabulary, N experts. `labels` [B, S] holds at each position the token
that comes *next* (already shifted), or IGNORE where nothing is to be learnt. All results are float32 scalars.
"""

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
EXPERT_WEIGHT = 1 / 3  # λ of the SFT loss


def language_model_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L_LM: mean cross entropy of `logits` [B, S, V] over the positions that have a label; 0 if there is none."""
    return -label_log_probs(logits, labels).sum() / (labels != IGNORE).sum().clamp(min=1)


def label_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log π(y_t) [B, S] float32 under `logits` [B, S, V]; 0 where there is no label."""
    flat = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return -flat.view_as(labels)


def informative_positions(argmaxes: Tensor, labels: Tensor) -> Tensor:
    """Bool [B, S]: labelled positions where at least two experts disagree on the argmax token (`argmaxes` [N, B, S])."""
    return (argmaxes != argmaxes[:1]).any(dim=0) & (labels != IGNORE)


def routing_loss(routing: Tensor, expert_log_probs: Tensor, informative: Tensor) -> Tensor:
    """L_expert: −mean over informative positions of Σ_i softmax(w)_i log π_i(y_t); 0 if there is none.

    `routing` [B, S, N] holds the scores w = W·h, `expert_log_probs` [N, B, S] the log π_i(y_t) of the frozen experts.
    The paper prints the sum with w itself, which is linear in w and unbounded; its softmax makes it a mixture.
    """
    weights = routing.float().softmax(dim=-1)
    mixture = (weights * expert_log_probs.float().movedim(0, -1)).sum(dim=-1)
    return -(mixture * informative).sum() / informative.sum().clamp(min=1)


def sft_loss(logits: Tensor, routing: Tensor, labels: Tensor, expert_log_probs: Tensor, informative: Tensor) -> Tensor:
    """The router's whole loss on a batch; the arguments are those of the functions above."""
    lm = language_model_loss(logits, labels)
    return lm + EXPERT_WEIGHT * routing_loss(routing, expert_log_probs, informative)
