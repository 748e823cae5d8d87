from __future__ import annotations

import math

import pytest
import torch

from iou_d2.ops.losses import focal_loss, quality_focal_loss, varifocal_loss

LOSSES = [varifocal_loss, quality_focal_loss, focal_loss]


def cross_entropy(p: float, q: float) -> float:
    return -(q * math.log(p) + (1 - q) * math.log(1 - p))


def by_hand(loss, logit: float, q: float) -> float:
    """One entry, from the equations of the papers with their constants."""
    p = 1 / (1 + math.exp(-logit))
    if loss is varifocal_loss:
        return q * cross_entropy(p, q) if q > 0 else 0.75 * p**2 * cross_entropy(p, 0)
    if loss is quality_focal_loss:
        return abs(q - p) ** 2 * cross_entropy(p, q)
    return -0.25 * (1 - p) ** 2 * math.log(p) if q > 0 else -0.75 * p**2 * math.log(1 - p)


@pytest.fixture
def entries():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(60, 5, generator=generator, dtype=torch.float64)
    targets = torch.zeros(60, 5, dtype=torch.float64)
    rows = torch.arange(0, 60, 3)
    targets[rows, rows % 5] = torch.rand(20, generator=generator, dtype=torch.float64)
    targets[0, 0], targets[3, 3] = 1.0, 1e-6
    return logits, targets


@pytest.mark.parametrize("loss", LOSSES)
def test_sum_and_gradient_equal_a_loop(loss, entries):
    logits, targets = entries
    pairs = list(zip(logits.flatten().tolist(), targets.flatten().tolist()))
    logits.requires_grad_()
    total = loss(logits, targets)
    assert total.item() == pytest.approx(sum(by_hand(loss, *pair) for pair in pairs), rel=1e-9)

    total.backward()
    step = 1e-5
    slopes = [
        (by_hand(loss, x + step, q) - by_hand(loss, x - step, q)) / 2 / step for x, q in pairs
    ]
    expected = torch.tensor(slopes, dtype=torch.float64).view_as(logits)
    torch.testing.assert_close(logits.grad, expected, atol=1e-7, rtol=1e-5)


def test_varifocal_loss_weighs_a_positive_with_its_quality_only():
    logits = torch.tensor([[2.0]], requires_grad=True)
    varifocal_loss(logits, torch.tensor([[0.5]])).backward()
    # q * BCE, whose derivative is q * (p - q).
    assert logits.grad.item() == pytest.approx(0.5 * (1 / (1 + math.exp(-2)) - 0.5), rel=1e-5)


def test_varifocal_loss_takes_other_constants():
    p = 1 / (1 + math.exp(-0.3))
    loss = varifocal_loss(torch.tensor([[0.3]]), torch.zeros(1, 1), alpha=0.5, gamma=3.0)
    assert loss.item() == pytest.approx(0.5 * p**3 * -math.log(1 - p), rel=1e-5)


def test_quality_focal_loss_is_least_where_the_score_is_the_quality():
    q = torch.full((1, 1), 0.7)
    at, beside = torch.logit(q), torch.logit(q) + torch.tensor([[0.01]])
    assert quality_focal_loss(at, q) == 0 < quality_focal_loss(beside, q)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_have_finite_losses_and_gradients(loss, dtype):
    logits = torch.tensor([[-6e4, -80.0, 0.0, 80.0, 6e4]] * 2, dtype=dtype, requires_grad=True)
    targets = torch.tensor([[0.5] * 5, [0.0] * 5], dtype=dtype)
    total = loss(logits, targets)
    total.backward()
    assert torch.isfinite(total) and total.dtype == torch.float32
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_points(loss):
    logits = torch.zeros(0, 3, requires_grad=True)
    total = loss(logits, torch.zeros(0, 3))
    total.backward()
    assert total == 0 and logits.grad.shape == (0, 3)
