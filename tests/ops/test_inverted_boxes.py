"""MODEL.INVERTED_BOXES "sorted": step 1 of Algorithm 2 of GIoU (arXiv 1902.09630), for all losses
of boxes by their IoU. What is "collapsed" is tested with the losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from box_losses_by_hand import loss_of_pair, random_boxes, slope_of
from iou_d2.ops.box_losses import (
    IOU_KINDS,
    BoxDeltas,
    box_iou_loss,
    build_box_loss,
    collapsed,
    sorted_corners,
)

TARGET = [0.0, 0.0, 10.0, 10.0]
# Which of x and y is inverted.
INVERSIONS = [(False, False), (True, False), (False, True), (True, True)]


def by_algorithm_2(box, target, kind):
    """Python floats: x^ = (min, max) of the two x, likewise y, and then the paper's loss."""
    (x1, y1, x2, y2) = box
    upright = [x2 if x1 > x2 else x1, y2 if y1 > y2 else y1]
    upright += [x1 if x1 > x2 else x2, y1 if y1 > y2 else y2]
    return loss_of_pair(upright, target, kind)


def inverted_pairs(count, spread):
    """Predictions of which each quarter is inverted in another way, and upright targets."""
    generator = np.random.default_rng(11)
    boxes, targets = random_boxes(generator, count, spread), random_boxes(generator, count, spread)
    for index, box in enumerate(boxes):
        for axis, inverted in enumerate(INVERSIONS[index % 4]):
            if inverted:
                box[[axis, axis + 2]] = box[[axis + 2, axis]]
    return boxes, targets


def loss_and_gradient(boxes, targets, kind, dtype=torch.float64, inverted=sorted_corners):
    boxes = torch.tensor(boxes, dtype=dtype, requires_grad=True)
    loss = box_iou_loss(boxes, torch.tensor(targets, dtype=dtype), kind, inverted)
    loss.sum().backward()
    return loss.detach(), boxes.grad


@pytest.mark.parametrize("kind", IOU_KINDS)
def test_values_equal_algorithm_2(kind):
    boxes, targets = inverted_pairs(400, 60.0)
    expected = [by_algorithm_2(a, b, kind) for a, b in zip(boxes.tolist(), targets.tolist())]
    found, _ = loss_and_gradient(boxes, targets, kind)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)  # torchvision's eps
    other, _ = loss_and_gradient(boxes, targets, kind, inverted=collapsed)
    upright = torch.arange(400) % 4 == 0
    assert torch.equal(found[upright], other[upright])
    assert not torch.isclose(found[~upright], other[~upright]).all()


@pytest.mark.parametrize("kind", ["iou", "unitbox", "giou", "diou"])  # alpha of ciou is a constant
def test_gradients_equal_differences_of_algorithm_2(kind):
    boxes, targets = inverted_pairs(80, 15.0)
    _, gradient = loss_and_gradient(boxes, targets, kind)
    for a, b, found in zip(boxes.tolist(), targets.tolist(), gradient.tolist()):
        for i in range(4):
            slope = slope_of(lambda box, b=b: by_algorithm_2(box, b, kind), a, i)
            assert found[i] == pytest.approx(slope, abs=1e-7, rel=1e-5)


@pytest.mark.parametrize("inversion", INVERSIONS)
@pytest.mark.parametrize("kind", IOU_KINDS)
def test_corners_change_places_and_so_do_their_gradients(kind, inversion):
    upright = [[1.0, 2.0, 8.0, 14.0]]
    left, top = 2 * inversion[0], 1 + 2 * inversion[1]
    order = [left, top, 2 - left, 4 - top]
    expected, of_upright = loss_and_gradient(upright, [TARGET], kind)
    found, gradient = loss_and_gradient([[upright[0][i] for i in order]], [TARGET], kind)
    assert torch.equal(found, expected) and torch.equal(gradient, of_upright[:, order])


@pytest.mark.parametrize("kind", IOU_KINDS)
def test_the_mirrored_target_fits_perfectly(kind):
    loss, _ = loss_and_gradient([[10.0, 10.0, 0.0, 0.0]], [TARGET], kind)
    assert loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", IOU_KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_gradients_are_finite_whatever_the_corners(kind, dtype):
    corners = [-3e4, -5.0, 0.0, 1e-6, 5.0, 10.0, 3e4]
    boxes = [[a, b, c, 0.5] for a in corners for b in corners for c in corners]
    loss, gradient = loss_and_gradient(boxes, [TARGET] * len(boxes), kind, dtype)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    loss, gradient = loss_and_gradient([TARGET], [[10.0, 10.0, 0.0, 0.0]], kind, dtype)
    assert (gradient == 0).all() and loss >= 1  # a target is not sorted: it is wrong


@pytest.mark.parametrize("kind", IOU_KINDS)
def test_a_side_of_length_0_opens_as_before(kind):
    line = [[5.0, 0.0, 5.0, 10.0]]
    for a, b in zip(
        loss_and_gradient(line, [TARGET], kind),
        loss_and_gradient(line, [TARGET], kind, inverted=collapsed),
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", IOU_KINDS)
def test_nothing_and_nan(kind):
    loss, gradient = loss_and_gradient(np.zeros((0, 4)), np.zeros((0, 4)), kind)
    assert loss.shape == (0,) and gradient.shape == (0, 4)
    loss, _ = loss_and_gradient([[10.0, 10.0, math.nan, 0.0]], [TARGET], kind)
    assert loss.isnan().all()


class AsPredicted:
    """A transform whose deltas are the corners themselves, so that boxes may be inverted."""

    def apply_deltas(self, deltas, anchors):
        return deltas


@pytest.mark.parametrize(("name", "expected"), [("collapsed", 1.0), ("sorted", 0.0)])
def test_both_uses_of_a_loss_take_what_its_key_says(name, expected):
    inverted, target = torch.tensor([[10.0, 10.0, 0.0, 0.0]]), torch.tensor([TARGET])
    loss = build_box_loss("giou", 0.0, "KEY", name)
    of_deltas = loss.of_deltas(BoxDeltas(inverted, target, AsPredicted()), target)
    for found in (loss.of_sides(inverted, target), of_deltas):
        assert found.item() == pytest.approx(expected, abs=1e-6)


def test_another_word_is_named():
    with pytest.raises(ValueError, match="MODEL.INVERTED_BOXES is one of collapsed, sorted"):
        build_box_loss("giou", 0.0, "KEY", "swapped")
