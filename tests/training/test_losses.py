import math

import pytest
import torch

from fr_export.training.losses import (
    IGNORE,
    informative_positions,
    label_log_probs,
    language_model_loss,
    routing_loss,
    sft_loss,
)

B, S, V, N = 3, 7, 11, 3


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(x) for x in row))
    return [x - total for x in row]


@pytest.mark.parametrize("seed", [0, 1])
def test_sft_loss_equals_a_plain_loop(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    router, routing = torch.randn(B, S, V, generator=rng), torch.randn(B, S, N, generator=rng)
    experts = torch.randn(N, B, S, V, generator=rng)
    experts[:, 0, :, 4] = 9.0  # on the first row all experts agree: not informative
    labels = torch.randint(V, (B, S), generator=rng)
    labels[1, 2:5] = IGNORE

    lm, mixture = [], []
    for b in range(B):
        for s in range(S):
            y = int(labels[b, s])
            if y == IGNORE:
                continue
            lm.append(-log_softmax(router[b, s].tolist())[y])
            if len({int(experts[i, b, s].argmax()) for i in range(N)}) > 1:
                weights = [math.exp(w) for w in log_softmax(routing[b, s].tolist())]
                mixture.append(-sum(weights[i] * log_softmax(experts[i, b, s].tolist())[y] for i in range(N)))
    expected = sum(lm) / len(lm) + sum(mixture) / len(mixture) / 3

    log_probs = torch.stack([label_log_probs(own, labels) for own in experts])
    informative = informative_positions(experts.argmax(-1), labels)
    assert not informative[0].any()
    assert informative.sum() == len(mixture)
    assert sft_loss(router, routing, labels, log_probs, informative).item() == pytest.approx(expected, rel=1e-5)


def test_nothing_to_learn_gives_zero_and_a_finite_gradient() -> None:
    logits = torch.randn(B, S, V, requires_grad=True)
    routing = torch.randn(B, S, N, requires_grad=True)
    labels = torch.full((B, S), IGNORE)
    loss = sft_loss(logits, routing, labels, torch.zeros(N, B, S), informative_positions(torch.zeros(N, B, S), labels))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and routing.grad is not None
    assert not logits.grad.any() and not routing.grad.any()


def test_routing_loss_pulls_towards_the_best_expert() -> None:
    routing = torch.zeros(1, 1, N, requires_grad=True)
    log_probs = torch.tensor([-3.0, -0.1, -5.0]).view(N, 1, 1)
    routing_loss(routing, log_probs, torch.ones(1, 1, dtype=torch.bool)).backward()
    assert routing.grad is not None
    assert (-routing.grad).argmax() == 1


def test_language_model_loss_takes_half_precision() -> None:
    logits, labels = torch.randn(B, S, V), torch.randint(V, (B, S))
    full, half = language_model_loss(logits, labels), language_model_loss(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=1e-2)
