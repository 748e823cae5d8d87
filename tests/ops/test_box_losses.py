from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from box_losses_by_hand import loss_of_pair, random_boxes, slope_of
from iou_d2.ops.box_losses import IOU_KINDS, KINDS, box_iou_loss, build_box_loss

WITHOUT_GRADIENT_APART = ("iou", "unitbox")
PULLS_FROM_AFAR = ("giou", "diou", "ciou")
TARGET = [0.0, 0.0, 10.0, 10.0]


def with_gradient(boxes, targets, kind, dtype=torch.float32):
    boxes = torch.tensor(boxes, dtype=dtype, requires_grad=True)
    loss = box_iou_loss(boxes, torch.tensor(targets, dtype=dtype), kind)
    loss.sum().backward()
    return loss.detach(), boxes.grad


@pytest.mark.parametrize("kind", IOU_KINDS)
def test_values_equal_the_closed_form(kind):
    generator = np.random.default_rng(0)
    boxes, targets = random_boxes(generator, 1000), random_boxes(generator, 1000)
    expected = [loss_of_pair(a, b, kind) for a, b in zip(boxes.tolist(), targets.tolist())]
    found = box_iou_loss(torch.from_numpy(boxes), torch.from_numpy(targets), kind)
    assert found.shape == (1000,) and found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)  # torchvision's eps


@pytest.mark.parametrize("kind", IOU_KINDS)
def test_gradients_equal_differences_of_the_closed_form(kind):
    generator = np.random.default_rng(1)
    boxes, targets = random_boxes(generator, 60, 20.0), random_boxes(generator, 60, 20.0)
    _, gradient = with_gradient(boxes, targets, kind, torch.float64)
    step = 1e-6
    for a, b, found in zip(boxes.tolist(), targets.tolist(), gradient.tolist()):
        for i in range(4):
            slope = slope_of(lambda box, b=b: loss_of_pair(box, b, kind), a, i, step)
            if kind == "ciou":  # whose alpha is a constant to the gradient
                slope = slope_of_ciou(a, b, i, step)
            assert found[i] == pytest.approx(slope, abs=1e-7, rel=1e-5)


def slope_of_ciou(a, b, i, step):
    def parts(shift):
        moved = [x + shift * (i == j) for j, x in enumerate(a)]
        angles = [math.atan((x[2] - x[0]) / (x[3] - x[1])) for x in (moved, b)]
        v = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
        return loss_of_pair(moved, b, "diou"), v, v / (loss_of_pair(moved, b, "iou") + v)

    low, here, high = parts(-step), parts(0.0), parts(step)
    return (high[0] - low[0] + here[2] * (high[1] - low[1])) / (2 * step)


def test_gradient_of_unitbox_is_its_equation_7():
    """For a pixel's distances x to the top, bottom, left and right, with X the predicted area:
    dL/dx = dX/dx / U - (U + I) / (U I) dI/dx."""
    generator = np.random.default_rng(2)
    for predicted, truth in generator.uniform(1, 50, (100, 2, 4)):
        distances = torch.tensor(predicted, requires_grad=True)
        t, b, left, right = distances
        boxes = torch.stack([-left, -t, right, b])[None]
        target = torch.tensor([[-truth[2], -truth[0], truth[3], truth[1]]])
        box_iou_loss(boxes, target, "unitbox").sum().backward()

        inner_height = min(predicted[0], truth[0]) + min(predicted[1], truth[1])
        inner_width = min(predicted[2], truth[2]) + min(predicted[3], truth[3])
        height, width = predicted[0] + predicted[1], predicted[2] + predicted[3]
        inner = inner_height * inner_width
        union = height * width + (truth[0] + truth[1]) * (truth[2] + truth[3]) - inner
        for i in range(4):
            area_slope = width if i < 2 else height
            inner_slope = (inner_width if i < 2 else inner_height) * (predicted[i] < truth[i])
            slope = area_slope / union - (union + inner) / (union * inner) * inner_slope
            assert distances.grad[i].item() == pytest.approx(slope, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("box", "losses"),
    [
        (TARGET, (0, 0, 0, 0, 0)),
        # Containment, either way round: IoU 1/4, one square in the middle of another.
        ([2.5, 2.5, 7.5, 7.5], (0.75, math.log(4), 0.75, 0.75, 0.75)),
        ([-5, -5, 15, 15], (0.75, math.log(4), 0.75, 0.75, 0.75)),
        # No overlap: the hull is 30 x 10, the centres are 20 apart.
        ([20, 0, 30, 10], (1, -math.log(1e-6), 4 / 3, 1.4, 1.4)),
        # They touch.
        ([10, 0, 20, 10], (1, -math.log(1e-6), 1, 1.2, 1.2)),
        # Half as wide, flush left: IoU 1/2, centres 2.5 apart, v = 4 / pi^2 (atan 1/2 - pi/4)^2.
        ([0, 0, 5, 10], (0.5, math.log(2), 0.5, 0.53125, 0.53125 + 0.041957**2 / 0.541957)),
    ],
    ids=["identical", "inside", "around", "apart", "touching", "half"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_by_hand(box, losses, dtype):
    boxes, targets = torch.tensor([box], dtype=dtype), torch.tensor([TARGET], dtype=dtype)
    for kind, loss in zip(IOU_KINDS, losses):
        assert box_iou_loss(boxes, targets, kind).item() == pytest.approx(loss, abs=1e-5), kind


@pytest.mark.parametrize("kind", WITHOUT_GRADIENT_APART)
def test_iou_has_no_gradient_without_overlap(kind):
    loss, gradient = with_gradient([[20, 3, 30, 9], [10, 0, 20, 10]], [TARGET] * 2, kind)
    assert (gradient[0] == 0).all() and torch.isfinite(gradient).all()
    assert loss[0] == pytest.approx(1 if kind == "iou" else 13.8155, abs=1e-4)


@pytest.mark.parametrize("kind", PULLS_FROM_AFAR)
def test_giou_and_its_kin_lead_a_box_to_a_target_that_it_does_not_overlap(kind):
    boxes = torch.tensor([[40.0, 30.0, 55.0, 38.0]], requires_grad=True)
    target = torch.tensor([TARGET])
    assert box_iou_loss(boxes, target, "iou").item() == 1
    optimizer = torch.optim.Adam([boxes], lr=0.5)
    for _ in range(150):
        optimizer.zero_grad()
        box_iou_loss(boxes, target, kind).sum().backward()
        optimizer.step()
    assert box_iou_loss(boxes, target, "iou").item() < 0.99


@pytest.mark.parametrize("kind", IOU_KINDS)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_an_inverted_box_counts_as_the_point_at_its_centre(kind, offset):
    # The mirrored target, to which torchvision's GIoU loss gives 0.
    inverted = [[10 + offset, 10.0, offset, 0.0]]
    loss, gradient = with_gradient(inverted, [TARGET], kind)
    point, _ = with_gradient([[5 + offset, 5.0, 5 + offset, 5.0]], [TARGET], kind)
    assert loss == point and loss >= 1
    assert torch.isfinite(gradient).all()
    if offset and kind in PULLS_FROM_AFAR:
        assert gradient[0, 0] > 0 and gradient[0, 2] > 0  # a descent moves both corners left


def test_a_box_inverted_in_one_direction_keeps_the_other():
    loss, _ = with_gradient([[12.0, 2.0, 8.0, 6.0]], [TARGET], "giou")
    line, _ = with_gradient([[10.0, 2.0, 10.0, 6.0]], [TARGET], "giou")
    assert loss == line


@pytest.mark.parametrize("kind", IOU_KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_without_area_values_and_gradients_are_finite(kind, dtype):
    shapes = [[5, 5, 5, 5], [5, 0, 5, 10], [0, 5, 10, 5], [0, 0, 0, 0], [30, 5, 30, 5], TARGET]
    boxes = [box for box in shapes for _ in shapes]
    loss, gradient = with_gradient(boxes, shapes * len(shapes), kind, dtype)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    # Only the last pair, the target with itself, fits.
    assert (loss[:-1] >= 1 - 1e-6).all() and loss[-1] == pytest.approx(0, abs=1e-6)
    assert gradient.abs().max() < 10


@pytest.mark.parametrize("kind", IOU_KINDS)
def test_a_box_without_width_opens_towards_its_target(kind):
    """As after a ReLU of distances. The others have no gradient around a centre that fits."""
    _, gradient = with_gradient([[5.0, 0.0, 5.0, 10.0]], [TARGET], kind)
    if kind in ("iou", "giou"):
        assert gradient[0, 0] > 0 and gradient[0, 2] < 0
    else:
        assert torch.equal(gradient, torch.zeros(1, 4))


@pytest.mark.parametrize("kind", IOU_KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_almost_empty_boxes_have_finite_losses_and_small_gradients(kind, dtype):
    for exponent in range(-30, 1):
        side = 10.0**exponent
        boxes = [[0.0, 0.0, side, side], [0.0, 0.0, side, 1.0], [0.0, 0.0, 100.0, side]]
        loss, gradient = with_gradient(boxes, [[0.0, 0.0, 100.0, 1.0]] * 3, kind, dtype)
        assert torch.isfinite(loss).all()
        assert kind == "unitbox" or gradient.abs().max() < 100, side


@pytest.mark.parametrize("kind", IOU_KINDS)
def test_of_nothing(kind):
    boxes = torch.zeros(0, 4, requires_grad=True)
    loss = box_iou_loss(boxes, torch.zeros(0, 4), kind)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert boxes.grad.shape == (0, 4)


@pytest.mark.parametrize("kind", IOU_KINDS)
@pytest.mark.parametrize("scale", [1e-2, 1e5, 1e8, 1e12])
def test_scale_does_not_matter(kind, scale):
    generator = np.random.default_rng(3)
    boxes, targets = random_boxes(generator, 300), random_boxes(generator, 300)
    expected = [loss_of_pair(a, b, kind) for a, b in zip(boxes.tolist(), targets.tolist())]
    loss, gradient = with_gradient(boxes * scale, targets * scale, kind)
    # A thin overlap is known to a part of a million of the box, and its logarithm accordingly.
    np.testing.assert_allclose(loss, expected, rtol=1e-3 if kind == "unitbox" else 0, atol=1e-4)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", IOU_KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(kind, dtype):
    generator = np.random.default_rng(4)
    boxes, targets = random_boxes(generator, 2000, 1200.0), random_boxes(generator, 2000, 1200.0)
    targets[:1000] = boxes[:1000] + generator.uniform(-9, 9, (1000, 4))
    boxes, targets = torch.from_numpy(boxes).to(dtype), torch.from_numpy(targets).to(dtype)
    boxes.requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = box_iou_loss(boxes, targets, kind)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, box_iou_loss(boxes.float(), targets.float(), kind))
    loss.sum().backward()
    assert boxes.grad.dtype == dtype and torch.isfinite(boxes.grad).all()
    assert (boxes.grad != 0).any()


@pytest.mark.parametrize("kind", IOU_KINDS)
def test_weights_of_boxes(kind):
    generator = np.random.default_rng(5)
    boxes, targets = random_boxes(generator, 20, 10.0), random_boxes(generator, 20, 10.0)
    weights = torch.linspace(0, 2, 20, dtype=torch.float64)
    loss, gradient = with_gradient(boxes, targets, kind, torch.float64)
    weighted = torch.from_numpy(boxes).requires_grad_()
    total = (weights * box_iou_loss(weighted, torch.from_numpy(targets), kind)).sum()
    total.backward()
    assert total.item() == pytest.approx(sum(w * x for w, x in zip(weights.tolist(), loss)))
    torch.testing.assert_close(weighted.grad, weights[:, None] * gradient)


@pytest.mark.parametrize("kind", IOU_KINDS)
def test_nan_is_not_hidden(kind):
    loss, _ = with_gradient([[math.nan, 0.0, 10.0, 10.0]], [TARGET], kind)
    assert loss.isnan().all()


@pytest.mark.parametrize("shapes", [((2, 4), (1, 4)), ((2, 5), (2, 5)), ((4,), (1, 4))])
@pytest.mark.parametrize("kind", IOU_KINDS)
def test_wrong_shapes_are_named(shapes, kind):
    with pytest.raises(ValueError, match="one shape"):
        box_iou_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]), kind)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="one of iou, unitbox, giou, diou, ciou, not 'smooth_l1'"):
        box_iou_loss(torch.zeros(1, 4), torch.zeros(1, 4), "smooth_l1")
    with pytest.raises(ValueError, match="SOME.KEY is one of smooth_l1, l2, iou,.* is 'huber'"):
        build_box_loss("huber", 0.0, "SOME.KEY")
    for kind in KINDS:
        build_box_loss(kind, 0.0, "SOME.KEY")
