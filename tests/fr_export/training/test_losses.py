"""The losses against plain loops over numbers."""

import math

import pytest
import torch

from fusionroute.fr_export.training.losses import (
    cdpo_logits,
    cdpo_loss,
    label_log_probs,
    language_model_loss,
    preference_gaps,
    routing_loss,
    selected_log_probs,
)

T, V, N = 9, 11, 3


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(x) for x in row))
    return [x - total for x in row]


@pytest.mark.parametrize("seed", [0, 1])
def test_sft_losses_equal_plain_loops(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits, routing = torch.randn(T, V, generator=rng), torch.randn(T, N, generator=rng)
    experts = -torch.rand(N, T, generator=rng)
    labels, informative = torch.randint(V, (T,), generator=rng), torch.rand(T, generator=rng) < 0.6
    own = [log_softmax(logits[t].tolist())[int(labels[t])] for t in range(T)]
    assert label_log_probs(logits, labels).tolist() == pytest.approx(own, rel=1e-5)
    assert language_model_loss(logits, labels).item() == pytest.approx(-sum(own) / T, rel=1e-5)
    mixtures = []
    for t in range(T):
        if informative[t]:
            weights = [math.exp(w) for w in log_softmax(routing[t].tolist())]
            mixtures.append(sum(weights[i] * float(experts[i, t]) for i in range(N)))
    assert routing_loss(routing, experts, informative).item() == pytest.approx(-sum(mixtures) / len(mixtures), rel=1e-5)


def test_no_informative_token_gives_zero_and_a_finite_gradient() -> None:
    routing = torch.randn(T, N, requires_grad=True)
    loss = routing_loss(routing, torch.zeros(N, T), torch.zeros(T, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert routing.grad is not None and not routing.grad.any()


def test_routing_loss_pulls_towards_the_best_expert() -> None:
    routing = torch.zeros(1, N, requires_grad=True)
    routing_loss(routing, torch.tensor([[-3.0], [-0.1], [-5.0]]), torch.ones(1, dtype=torch.bool)).backward()
    assert routing.grad is not None
    assert (-routing.grad).argmax() == 1


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_cdpo_equals_a_plain_loop(beta: float) -> None:
    rng = torch.Generator().manual_seed(0)
    owners = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])  # rows 0, 1 chosen; 2, 3 rejected
    count = len(owners)
    policy, reference = -5 * torch.rand(count, generator=rng), -5 * torch.rand(count, generator=rng)
    routing, experts = torch.randn(count, N, generator=rng), -5 * torch.rand(N, count, generator=rng)
    expected = []
    for pair in range(2):
        total = bias = 0.0
        for t in range(count):
            if owners[t] % 2 == pair:
                sign = 1 if owners[t] < 2 else -1
                scores = routing[t].tolist()
                total += sign * (float(policy[t]) - float(reference[t]))
                bias += sign * float(experts[scores.index(max(scores)), t])
        expected.append(-math.log(1 / (1 + math.exp(-(beta * total + beta * bias)))))
    router, before, expert = (preference_gaps(own, owners, 2) for own in (policy, reference, selected_log_probs(routing, experts)))
    loss = cdpo_loss(cdpo_logits(router, before, expert, beta))
    assert loss.item() == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_the_bias_of_cdpo_carries_no_gradient_but_counts() -> None:
    policy = torch.tensor([0.3], requires_grad=True)
    routing = torch.randn(2, N, requires_grad=True)
    experts = torch.randn(N, 2, requires_grad=True)
    expert = preference_gaps(selected_log_probs(routing, experts), torch.tensor([0, 1]), 1)
    cdpo_loss(cdpo_logits(policy, torch.zeros(1), expert, 1.0)).backward()
    assert routing.grad is None and experts.grad is None
    assert policy.grad is not None
    slope = -1 / (1 + math.exp(0.3 + float(expert.detach())))  # −σ(−x), x with the bias in it
    assert policy.grad.item() == pytest.approx(slope, rel=1e-5)


def test_half_precision_logits_give_float32_losses() -> None:
    logits, labels = torch.randn(T, V), torch.randint(V, (T,))
    full, half = language_model_loss(logits, labels), language_model_loss(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=1e-2)
