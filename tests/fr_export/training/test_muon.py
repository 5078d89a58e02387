"""Muon for matrices, and plain AdamW for everything else in the same optimizer."""

import pytest
import torch

from fusionroute.fr_export.training.muon import Muon, orthogonalise


def test_orthogonalise_pushes_singular_values_towards_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 16, 40), (2, 40, 16), (1, 24, 24)):
        singular = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert singular.max() < 1.3
        assert singular.median() > 0.6


def test_an_update_moves_elements_as_far_as_adamw_would() -> None:
    torch.manual_seed(0)
    matrix = torch.zeros(30, 60, requires_grad=True)
    optimizer = Muon([matrix], lr=0.5)
    matrix.grad = 1e-4 * torch.randn(30, 60)
    optimizer.step()
    size = matrix.detach().square().mean().sqrt().item()
    assert size == pytest.approx(0.2 * 0.5, rel=0.3)  # however small the gradient
    assert (matrix * matrix.grad).sum() < 0


def test_groups_without_muon_are_adamws() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(6), torch.randn(5, 6)
    ours, theirs, matrix = start.clone().requires_grad_(), start.clone().requires_grad_(), torch.randn(4, 4, requires_grad=True)
    mixed = Muon([{"params": [matrix]}, {"params": [ours], "muon": False, "lr": 0.1}], lr=0.01)
    plain = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.01)
    for gradient in gradients:
        ours.grad, theirs.grad, matrix.grad = gradient.clone(), gradient.clone(), torch.randn(4, 4)
        mixed.step()
        plain.step()
        mixed = reloaded(mixed)
    assert torch.equal(ours, theirs)
    assert set(mixed.state[matrix]) == {"momentum"}


def reloaded(optimizer: Muon) -> Muon:
    """The same after a checkpoint."""
    groups = [{"params": group["params"], "muon": group["muon"]} for group in optimizer.param_groups]
    fresh = Muon(groups, lr=1.0)
    fresh.load_state_dict(optimizer.state_dict())
    return fresh
