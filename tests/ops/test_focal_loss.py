"""The focal loss of labels against the formula entry by entry, and against fvcore."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss

from iou_d2.ops import focal_loss as module
from iou_d2.ops.focal_loss import focal_loss_of_labels


def entry(logit: float, is_class: bool, alpha: float, gamma: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    if is_class:
        return -alpha * (1 - p) ** gamma * math.log(p)
    return -(1 - alpha) * p**gamma * math.log(1 - p)


def by_hand(logits, labels, alpha, gamma) -> float:
    return sum(
        entry(logit, k == label, alpha, gamma)
        for row, label in zip(logits.tolist(), labels.tolist())
        for k, logit in enumerate(row)
        if label >= 0
    )


def random_entries(rows: int, classes: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    logits = 3 * torch.randn(rows, classes, generator=generator)
    return logits.to(dtype), torch.randint(-1, classes + 1, (rows,), generator=generator)


def value_and_gradient(loss, logits):
    logits = logits.clone().requires_grad_()
    total = loss(logits)
    (3 * total).backward()
    return total.detach(), logits.grad


@pytest.fixture(params=[3, 2**17], ids=["a row at a time", "at once"])
def parts(request, monkeypatch):
    monkeypatch.setattr(module, "_CPU_SCORES", request.param)


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.5, 0.0), (0.9, 1.5)])
@pytest.mark.parametrize("rows, classes", [(40, 3), (40, 1), (1, 5)])
def test_it_equals_the_formula_entry_by_entry(parts, rows, classes, alpha, gamma):
    logits, labels = random_entries(rows, classes)
    found = focal_loss_of_labels(logits, labels, alpha, gamma)
    assert found.item() == pytest.approx(by_hand(logits, labels, alpha, gamma), rel=1e-12)
    step = 1e-6
    _, gradient = value_and_gradient(
        lambda x: focal_loss_of_labels(x, labels, alpha, gamma), logits
    )
    for row, k in [(0, 0), (rows - 1, classes - 1), (rows // 2, classes // 2)]:
        moved = [logits.clone() for _ in range(2)]
        moved[0][row, k] += step
        moved[1][row, k] -= step
        high, low = (by_hand(x, labels, alpha, gamma) for x in moved)
        assert gradient[row, k].item() == pytest.approx(3 * (high - low) / 2 / step, abs=1e-6)


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-10), (torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
def test_it_equals_fvcore(parts, dtype, tolerance):
    logits, labels = random_entries(500, 4, dtype)
    counted = labels >= 0
    targets = F.one_hot(labels[counted], 5)[:, :-1].to(logits)
    wanted, of_wanted = value_and_gradient(
        lambda x: sigmoid_focal_loss(x[counted], targets, 0.25, 2.0, "sum"), logits
    )
    found, of_found = value_and_gradient(lambda x: focal_loss_of_labels(x, labels), logits)
    # fvcore computes in float32 at most.
    assert found.item() == pytest.approx(wanted.item(), rel=max(tolerance, 1e-6))
    torch.testing.assert_close(of_found, of_wanted, rtol=tolerance, atol=3e-6)
    assert of_found.dtype == dtype and found.dtype == torch.promote_types(dtype, torch.float32)
    assert (of_found[~counted] == 0).all()


def test_scores_that_are_sure_have_finite_losses_and_gradients():
    logits = torch.tensor([[-1e4, 1e4], [1e4, -1e4], [200.0, -200.0]])
    total, gradient = value_and_gradient(
        lambda x: focal_loss_of_labels(x, torch.tensor([0, 0, 2])), logits
    )
    # Wrong by 1e4 twice as background and once as an object, and by 200.
    assert total.item() == pytest.approx(0.25 * 1e4 + 0.75 * 1e4 + 0.75 * 200)
    expected = torch.tensor([[-0.75, 2.25], [0, 0], [2.25, 0]])
    torch.testing.assert_close(gradient, expected)


def test_a_score_that_is_no_number_is_not_hidden():
    logits = torch.tensor([[float("nan"), 0.0]])
    assert focal_loss_of_labels(logits, torch.tensor([2])).isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_anchor_that_does_not_count_may_have_any_score(bad):
    logits = torch.tensor([[bad, bad], [0.5, -0.5]])
    total, gradient = value_and_gradient(
        lambda x: focal_loss_of_labels(x, torch.tensor([-1, 1])), logits
    )
    alone = focal_loss_of_labels(logits[1:], torch.tensor([1]))
    assert total == alone and (gradient[0] == 0).all() and gradient[1].isfinite().all()


def test_a_class_that_the_logits_do_not_have_is_told():
    with pytest.raises(ValueError, match="A label is 4, but the logits are of 3 classes"):
        focal_loss_of_labels(torch.zeros(2, 3), torch.tensor([4, 0]))


def test_no_anchors_and_none_that_count():
    for logits, labels in ((torch.zeros(0, 3), []), (torch.zeros(2, 3), [-1, -1])):
        labels = torch.tensor(labels, dtype=torch.int64)
        total, gradient = value_and_gradient(lambda x, y=labels: focal_loss_of_labels(x, y), logits)
        assert total == 0 and gradient.shape == logits.shape and (gradient == 0).all()


def test_without_gradients_the_loss_has_none():
    logits, labels = random_entries(9, 3)
    with torch.no_grad():
        assert not focal_loss_of_labels(logits.requires_grad_(), labels).requires_grad
    assert not focal_loss_of_labels(logits.detach(), labels).requires_grad


def test_backward_twice_gives_the_same():
    logits, labels = random_entries(9, 3)
    logits.requires_grad_()
    total = focal_loss_of_labels(logits, labels)
    first, second = (torch.autograd.grad(total, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (slope,) = torch.autograd.grad(total, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        slope.sum().backward()


def test_shapes_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match=r"not \(4, 3\) and \(5,\)"):
        focal_loss_of_labels(torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="are \\(R, K\\) and labels"):
        focal_loss_of_labels(torch.zeros(4), torch.zeros(4, dtype=torch.int64))
