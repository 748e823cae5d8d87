"""The focal loss that RetinaNet learns classes by: Eqn. 5 of arXiv 1708.02002, in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.modeling import build_model

from iou_d2.detectors.retinanet import AnchorPrediction
from iou_d2.detectors.retinanet_parts import Share

CLASSES = 3
IGNORED = -1
ALL_OF_IT = (Share(slice(None), 1.0),)


def focal(x: float, is_object: bool, alpha: float, gamma: float) -> float:
    """-alpha_t (1 - p_t)^gamma ln p_t, without a difference of near numbers. p_t = sigmoid(z)."""
    z, weight = (x, alpha) if is_object else (-x, 1 - alpha)
    cross_entropy = math.log1p(math.exp(-abs(z))) + max(-z, 0.0)
    wrong = 1 / (1 + math.exp(z)) if z < 700 else 0.0
    return weight * wrong**gamma * cross_entropy


def total(logits, labels, alpha=0.25, gamma=2.0) -> float:
    """Over lists of the logits of anchors, one a class, and their labels."""
    return sum(
        focal(x, k == label, alpha, gamma)
        for row, label in zip(logits, labels)
        if label != IGNORED
        for k, x in enumerate(row)
    )


@pytest.fixture
def class_loss(small_cfg):
    """A function: logits (N, R, K), labels, shares -> the loss of RetinaNet."""

    def loss(logits, labels, shares=ALL_OF_IT, *overrides):
        model = build_model(small_cfg("retinanet_R_50_FPN_1x", *overrides))
        half = logits.shape[1] // 2
        parts = logits[:, :half], logits[:, half:]  # of two levels
        levels = [AnchorPrediction(None, part, None) for part in parts]
        return model.class_loss(levels, labels, list(shares))

    return loss


def anchors(count, scale=4.0):
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(2, count, CLASSES, generator=generator)
    labels = torch.randint(IGNORED, CLASSES + 1, (2, count), generator=generator)
    return logits, labels


def rows_of(logits, labels):
    return logits.flatten(0, 1).tolist(), labels.flatten().tolist()


@pytest.mark.parametrize(
    ("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.75, 1.0), (0.25, 5.0)], ids=str
)
def test_the_sum_equals_the_closed_form(class_loss, alpha, gamma):
    logits, labels = anchors(60)
    assert set(labels.flatten().tolist()) == {IGNORED, 0, 1, 2, CLASSES}
    keys = "MODEL.RETINANET.FOCAL_LOSS_ALPHA", str(alpha)
    keys += "MODEL.RETINANET.FOCAL_LOSS_GAMMA", str(gamma)
    found = class_loss(logits, labels, (Share(slice(None), 8.0),), *keys)
    assert found.item() == pytest.approx(
        total(*rows_of(logits, labels), alpha, gamma) / 8, rel=1e-5
    )


def test_alpha_and_gamma_are_those_of_the_paper(class_loss):
    """Table 1b: 0.25 and 2. Of an object at p = 0.9 a hundredth of its cross-entropy is left."""
    logit = math.log(9)
    found = class_loss(torch.full((1, 2, CLASSES), logit), torch.tensor([[0, IGNORED]]))
    expected = -0.25 * 0.01 * math.log(0.9) - 2 * 0.75 * 0.81 * math.log(0.1)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_gradients_equal_differences_of_the_closed_form(class_loss):
    logits, labels = anchors(20)
    logits.requires_grad_()
    class_loss(logits, labels).backward()
    step = 1e-5
    rows = zip(*rows_of(logits, labels), logits.grad.flatten(0, 1).tolist())
    for row, label, gradient in rows:
        for k, (x, found) in enumerate(zip(row, gradient)):
            slope = 0.0
            if label != IGNORED:
                low, high = (focal(x + s, k == label, 0.25, 2.0) for s in (-step, step))
                slope = (high - low) / (2 * step)
            assert found == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("x", [-100.0, -30.0, 0.0, 30.0, 100.0])
@pytest.mark.parametrize("label", [0, CLASSES])
def test_extreme_logits(class_loss, x, label):
    """A wrong answer costs what cross-entropy says, with the slope alpha_t; a right one nothing."""
    logits = torch.full((1, 2, CLASSES), x).requires_grad_()
    labels = torch.tensor([[label, IGNORED]])
    loss = class_loss(logits, labels)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert loss.item() == pytest.approx(total([[x] * CLASSES], [label]), rel=1e-5, abs=1e-12)
    of_class = logits.grad[0, 0, 0].item()
    if abs(x) == 100:
        is_object = label == 0
        wrong = (x < 0) == is_object
        slope = (-0.25 if is_object else 0.75) if wrong else 0.0
        assert of_class == pytest.approx(slope, abs=1e-6)
    assert (logits.grad[0, 1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(class_loss, dtype):
    logits, labels = anchors(30)
    logits = logits.to(dtype).requires_grad_()
    loss = class_loss(logits, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(logits.grad).all()
    assert loss.item() == pytest.approx(total(*rows_of(logits.double(), labels)), rel=1e-4)


def test_an_image_has_its_share_and_none_is_left_without_gradient(class_loss):
    logits, labels = anchors(10)
    shares = Share(slice(0, 1), 2.0), Share(slice(1, 2), 5.0)
    found = class_loss(logits, labels, shares)
    images = [total(logits[i].tolist(), labels[i].tolist()) for i in (0, 1)]
    assert found.item() == pytest.approx(images[0] / 2 + images[1] / 5, rel=1e-5)
    nothing = torch.full((2, 4), IGNORED)
    logits = torch.randn(2, 4, CLASSES, requires_grad=True)
    loss = class_loss(logits, nothing)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()
