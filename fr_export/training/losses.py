"""The losses of the FusionRoute paper (arXiv:2601.05106): supervised (SFT) and complementary DPO (CDPO).

T learnt tokens, V entries of the vocabulary, N experts, P pairs. Results are float32. `labels` int64 [T] holds the
learnt tokens y_t; all other arguments over T follow its order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def label_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log π(y_t) [T] under `logits` [T, V]."""
    return -F.cross_entropy(logits.float(), labels, reduction="none")


def language_model_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L_LM: cross entropy of `logits` [T, V], a mean over tokens."""
    return F.cross_entropy(logits.float(), labels)


def routing_loss(routing: Tensor, expert_log_probs: Tensor, informative: Tensor) -> Tensor:
    """L_expert: cross entropy of the mixture log π_agg = Σ_i w_i log π_i, a mean over the informative tokens.

    0 where no token is informative. `routing` [T, N] holds the scores w = W·h, `expert_log_probs` [N, T] the log
    π_i(y_t) of the frozen experts; `informative` bool [T] says where at least two experts disagree on the most probable
    token. The whole SFT loss is L_LM + λ·L_expert.

    Here w_i is softmax(w)_i: the sum as printed in the paper is linear in w, so the loss would fall without bound as w
    is scaled.
    """
    mixture = (routing.float().softmax(dim=-1) * expert_log_probs.T).sum(dim=-1)
    return -(mixture * informative).sum() / informative.sum().clamp(min=1)


def preference_gaps(log_probs: Tensor, owners: Tensor, pairs: int) -> Tensor:
    """Δ log π [P]: Σ_t log π(y_t) of the chosen answer less that of the rejected one.

    `log_probs` float32 [T]; `owners` int64 [T] names the row of each: the P chosen answers are rows 0 … P−1, the
    rejected ones P … 2P−1.
    """
    sums = torch.zeros(2 * pairs, device=log_probs.device).index_add(0, owners, log_probs)
    return sums[:pairs] - sums[pairs:]


def selected_log_probs(routing: Tensor, expert_log_probs: Tensor) -> Tensor:
    """log π_expert(y_t) [T] of the expert that the head selects at each token, argmax_i w_i. No gradient.

    `routing` [T, N], `expert_log_probs` [N, T].
    """
    return expert_log_probs.gather(0, routing.detach().argmax(dim=-1)[None])[0]


def cdpo_logits(policy: Tensor, reference: Tensor, expert: Tensor, beta: float) -> Tensor:
    """β·[Δ log π_θ − Δ log π_ref] + B [P], with B = β·Δ log π_expert, a bias without gradient.

    The arguments are the gaps [P] of the router, of the reference (the router before this stage), and of the selected
    experts. With zeros for `expert` it is the logit of DPO (arXiv:2305.18290).
    """
    return beta * (policy - reference) + beta * expert.detach()


def cdpo_loss(logits: Tensor) -> Tensor:
    """−log σ(logit), a mean over pairs [P]."""
    return -F.logsigmoid(logits).mean()
