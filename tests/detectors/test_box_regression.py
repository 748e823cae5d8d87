"""box_losses.py: the losses of predicted sides and of predicted deltas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from box_losses_by_hand import loss_of_pair, random_boxes
from iou_d2.ops.box_losses import IOU_KINDS, KINDS, BoxDeltas, build_box_loss

TARGET = [0.0, 0.0, 10.0, 10.0]


def side_loss(boxes, targets, kind, unit=1.0, beta=1.0):
    return build_box_loss(kind, beta, "KEY").of_sides(boxes, targets, unit)


def regression_loss(deltas, anchors, targets, transform, kind, beta=0.0):
    predicted = BoxDeltas(deltas, anchors, transform)
    return build_box_loss(kind, beta, "KEY").of_deltas(predicted, targets)


@pytest.mark.parametrize("kind", KINDS)
def test_box_side_loss_equals_a_loop(kind):
    generator = np.random.default_rng(8)
    targets = random_boxes(generator, 50)
    boxes = targets + generator.uniform(-0.9, 0.9, (50, 4))
    units = generator.choice([0.25, 1.0, 8.0], (50, 1))
    expected = []
    for box, target, (unit,) in zip(boxes, targets, units):
        errors = [abs(x - y) / unit for x, y in zip(box, target)]
        if kind == "l2":
            expected.append(sum(e * e for e in errors))
        elif kind == "smooth_l1":
            expected.append(sum(e * e if e < 0.5 else e - 0.25 for e in errors))
        else:
            expected.append(loss_of_pair(box, target, kind))
    boxes, targets, units = (torch.from_numpy(x) for x in (boxes, targets, units))
    found = side_loss(boxes, targets, kind, units, beta=0.5)
    # torchvision adds 1e-7 to what it divides by.
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_unit_of_sides_is_a_pixel_unless_told():
    boxes, target = torch.tensor([[0.5, 0.0, 13.0, 10.0]]), torch.tensor([TARGET])
    assert side_loss(boxes, target, "smooth_l1").tolist() == [0.125 + 2.5]
    assert side_loss(boxes, target, "l2").tolist() == [9.25]


@pytest.mark.parametrize("kind", KINDS)
def test_box_side_loss_of_nothing_has_gradients(kind):
    nothing = torch.zeros(0, 4, requires_grad=True)
    loss = side_loss(nothing, nothing.detach(), kind, torch.ones(0, 1))
    assert loss.shape == (0,)
    loss.sum().backward()
    assert nothing.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_box_side_loss_of_half_precision(kind, dtype):
    targets = torch.tensor([[0.0, 0.0, 1000.0, 1200.0], TARGET], dtype=dtype)
    boxes = (targets + 300).requires_grad_()
    loss = side_loss(boxes, targets, kind)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss).all()
    assert torch.isfinite(boxes.grad).all()


def regression_by_hand(deltas, anchors, targets, weights, kind, beta):
    total = 0.0
    for delta, a, g in zip(deltas, anchors, targets):
        w, h = a[2] - a[0], a[3] - a[1]
        if kind in IOU_KINDS:
            dx, dy, dw, dh = (d / weight for d, weight in zip(delta, weights))
            x, y = a[0] + w / 2 + dx * w, a[1] + h / 2 + dy * h
            w, h = w * math.exp(dw), h * math.exp(dh)
            total += loss_of_pair([x - w / 2, y - h / 2, x + w / 2, y + h / 2], g, kind)
            continue
        goal = [
            (g[0] + g[2] - a[0] - a[2]) / 2 / w,
            (g[1] + g[3] - a[1] - a[3]) / 2 / h,
            math.log((g[2] - g[0]) / w),
            math.log((g[3] - g[1]) / h),
        ]
        for d, t, weight in zip(delta, goal, weights):
            error = abs(d - t * weight)
            if kind == "l2":
                total += error**2
            else:
                total += error**2 / 2 / beta if error < beta else error - beta / 2
    return total


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_box_regression_loss_equals_a_loop(kind, beta, weights):
    generator = np.random.default_rng(6)
    deltas = generator.normal(0, 0.3, (50, 4)) * weights
    anchors = random_boxes(generator, 50)
    targets = anchors + generator.uniform(-0.9, 0.9, (50, 4))
    expected = regression_by_hand(deltas, anchors, targets, weights, kind, beta)
    deltas, anchors, targets = (
        torch.from_numpy(x.astype(np.float32)) for x in (deltas, anchors, targets)
    )
    transform = Box2BoxTransform(weights)
    found = regression_loss(deltas, anchors, targets, transform, kind, beta)
    assert found.shape == () and found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_box_regression_loss_of_nothing_has_gradients(kind):
    deltas = torch.zeros(0, 4, requires_grad=True)
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    loss = regression_loss(deltas, torch.zeros(0, 4), torch.zeros(0, 4), transform, kind)
    loss.backward()
    assert loss == 0 and deltas.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_box_regression_loss_of_half_precision(kind, dtype):
    generator = np.random.default_rng(7)
    anchors = torch.from_numpy(random_boxes(generator, 500, 1200.0)).float()
    deltas = torch.from_numpy(generator.normal(0, 3, (500, 4))).to(dtype).requires_grad_()
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    loss = regression_loss(deltas, anchors, anchors + 1, transform, kind)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert torch.isfinite(deltas.grad).all()
