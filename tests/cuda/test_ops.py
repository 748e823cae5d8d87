"""Operations on boxes, and deformable convolution, on CUDA and on the CPU. tests/ops compares NMS
and assignment with loops, on each device that there is."""

from __future__ import annotations

import math

import pytest
import torch

from iou_d2.detectors.multibox import bipartite_match, hard_negatives
from iou_d2.detectors.unitbox import REGIONS, assign_pixels
from iou_d2.layers.deform_conv import ModulatedDeformConv, deform_conv
from iou_d2.layers.suppressors import first_suppressors
from iou_d2.ops.assign import ATSSAssigner, FCOSAssigner
from iou_d2.ops.box_losses import KINDS, build_box_loss
from iou_d2.ops.box_voting import vote_boxes
from iou_d2.ops.calibration import PiecewiseLinear
from iou_d2.ops.focal_loss import focal_loss_of_labels
from iou_d2.ops.jitter import jitter_offsets, jittered_boxes
from iou_d2.ops.losses import focal_loss, quality_focal_loss, varifocal_loss
from iou_d2.ops.nms import batched_nms, best_of_nms, iou_guided_nms, soft_nms
from iou_d2.ops.points import PointGrid
from iou_d2.ops.refine import refine_boxes
from iou_d2.ops.rivals import needs_rank

DEVICE = "cuda"
STRIDES = (8, 16, 32)


def random_boxes(count: int, objects: int = 0, seed: int = 0):
    """(count, 4) all over an image, or close to `objects` places."""
    generator = torch.Generator().manual_seed(seed)
    places = objects or count
    corner = torch.rand(places, 2, generator=generator) * torch.tensor([300.0, 200.0])
    sides = 20 + 80 * torch.rand(places, 2, generator=generator)
    boxes = torch.cat([corner, corner + sides], dim=1)[torch.arange(count) % places]
    return boxes + 5 * torch.randn(count, 4, generator=generator)


def random_case(count: int, classes: int, objects: int, seed: int):
    """Boxes, two kinds of scores without ties, and classes."""
    generator = torch.Generator().manual_seed(seed)
    scores = [(torch.randperm(count, generator=generator) + 1) / (count + 1) for _ in range(2)]
    labels = torch.randint(classes, (count,), generator=generator)
    return random_boxes(count, objects, seed), *scores, labels


def on(device, values):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in values]


def same(function, *arguments, rtol: float = 0, atol: float = 0) -> list[torch.Tensor]:
    """What `function` of tensors gives on both devices; equal, and where it was asked to be."""
    results = [function(*on(device, arguments)) for device in (DEVICE, "cpu")]
    results = [[x] if isinstance(x, torch.Tensor) else list(x) for x in results]
    for found, wanted in zip(*results, strict=True):
        assert found.device.type == DEVICE and found.dtype == wanted.dtype
        torch.testing.assert_close(found.cpu(), wanted, rtol=rtol, atol=atol, equal_nan=True)
    return results[1]


CASES = [(n, k, o) for n in (0, 1, 50, 1000, 3000) for k in (1, 80) for o in (0, 20)]


@pytest.mark.parametrize("count, classes, objects", CASES)
def test_nms_of_each_kind(count, classes, objects):
    boxes, scores, ranks, labels = random_case(count, classes, min(objects, count), seed=count)
    for shift in (0.0, -200.0):
        moved = boxes + shift
        (keep,) = same(batched_nms, moved, scores, labels, 0.5)
        assert count < 1000 or len(keep) < count
        same(best_of_nms, moved, scores, labels, 0.5, 30)
        same(iou_guided_nms, moved, scores, ranks, labels, 0.5, first_suppressors)
        same(needs_rank, moved, scores, labels, 0.5, 100)
    if count <= 1000:
        same(vote_boxes, boxes, scores, labels, 0.5, rtol=1e-5, atol=1e-4)
        for method in ("linear", "gaussian"):
            settings = {"max_kept": 40}
            few = lambda *x, m=method, s=settings: soft_nms(*x, m, **s)  # noqa: E731
            same(few, boxes, scores, labels, rtol=1e-4, atol=1e-6)


def test_nms_of_boxes_that_are_no_numbers():
    boxes, scores, ranks, labels = random_case(60, 3, 4, seed=1)
    boxes[3, 1], boxes[9, 2], scores[7], ranks[11] = math.nan, math.inf, math.nan, math.nan
    same(batched_nms, boxes, scores, labels, 0.5)
    same(iou_guided_nms, boxes, scores, ranks, labels, 0.5, first_suppressors)
    same(needs_rank, boxes, scores, labels, 0.5, 10)


@pytest.mark.parametrize(
    "assigner",
    [
        ATSSAssigner(),
        FCOSAssigner(ranges=((-1, 64), (64, 128), (128, math.inf))),
        FCOSAssigner(ranges=((-1, 64), (64, 128), (128, math.inf)), center_sampling_radius=1.5),
    ],
)
@pytest.mark.parametrize("objects", [0, 1, 200])
def test_assignment_of_points(assigner, objects):
    maps = [torch.zeros(1, 1, -(-250 // s), -(-400 // s)) for s in STRIDES]

    def match(boxes, *maps):
        return assigner(PointGrid(STRIDES, 0.5)(maps), STRIDES, boxes)

    (index,) = same(match, random_boxes(objects), *maps)
    assert (index >= 0).any() == (objects > 0)


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_assignment_of_pixels(region):
    same(lambda boxes: assign_pixels(boxes, (120, 180), region), random_boxes(12))
    same(lambda boxes: assign_pixels(boxes, (120, 180), region), random_boxes(0))


def test_matching_and_mining_of_multibox():
    iou = torch.rand(9, 300, generator=torch.Generator().manual_seed(0))
    same(bipartite_match, iou)
    loss, counts = torch.rand(3, 300, generator=torch.Generator().manual_seed(1)), [0, 5, 400]
    same(hard_negatives, loss, loss > 0.3, torch.tensor(counts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inverted", ["collapsed", "sorted"])
def test_box_losses_and_their_gradients(kind, inverted):
    loss = build_box_loss(kind, 0.1, "KEY", inverted)

    def of_sides(boxes, targets):
        boxes = boxes.detach().requires_grad_()
        values = loss.of_sides(boxes, targets)
        return values.detach(), torch.autograd.grad(values.sum(), boxes)[0]

    boxes, targets = random_boxes(500), random_boxes(500)
    boxes[::7] += 300  # no overlap
    boxes[::5, 2:] -= 150  # inverted
    for dtype in (torch.float32, torch.float64):
        same(of_sides, boxes.to(dtype), targets.to(dtype), rtol=1e-3, atol=1e-5)
    same(of_sides, boxes[:0], targets[:0])


@pytest.mark.parametrize("loss", [focal_loss, quality_focal_loss, varifocal_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_class_losses(loss, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(100, 5, generator=generator)
    targets = torch.rand(100, 5, generator=generator)
    targets = (targets > 0.5).float() if loss is focal_loss else targets * (targets > 0.5)
    same(loss, logits.to(dtype), targets.to(dtype), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_focal_loss_of_labels(dtype):
    def of_logits(logits, labels):
        logits = logits.detach().requires_grad_()
        total = focal_loss_of_labels(logits, labels)
        return total.detach(), *torch.autograd.grad(total, logits)

    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(300, 80, generator=generator)
    labels = torch.randint(-1, 81, (300,), generator=generator)
    same(of_logits, logits.to(dtype), labels, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [
        {"early_stop": 0.0, "max_drop": -2.0},
        {"step_size": 60.0},
        {"step_size": 60.0, "roll_back": True},
    ],
)
def test_refinement_climbs_to_the_same_boxes(rule):
    boxes, goals = random_boxes(80).clamp(min=0), random_boxes(80, seed=1)
    limits = torch.tensor([[400.0, 300.0]]).repeat(80, 1)

    def refine(boxes, goals, limits):
        def score(moved, index):
            return torch.exp(-(moved - goals[index]).square().mean(dim=1) / 5000)

        return refine_boxes(boxes, score, limits, steps=5, **rule)

    same(refine, boxes, goals, limits, rtol=1e-4, atol=1e-3)


def test_jittered_boxes_lie_around_their_objects():
    boxes = random_boxes(6).clamp(min=0).to(DEVICE)
    offsets = jitter_offsets(per_step=20).to(DEVICE)
    drawn, index, ious = jittered_boxes(boxes, (400, 500), offsets, per_gt=50, per_image=200)
    assert drawn.device.type == index.device.type == ious.device.type == DEVICE
    assert 150 < len(drawn) <= 200 and (ious >= 0.5).all() and len(index.unique()) == 6
    nothing = jittered_boxes(boxes[:0], (400, 500), offsets, per_gt=50, per_image=200)
    assert [len(x) for x in nothing] == [0, 0, 0]


def test_calibration():
    knots = PiecewiseLinear((0.2, 0.5, 0.9), (0.1, 0.6, 0.7))
    same(knots, torch.linspace(0, 1, 50), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("stride, padding, dilation", [(1, 1, 1), (2, 2, 2)])
def test_deformable_convolution_and_its_gradients(dtype, has_mask, stride, padding, dilation):
    """torchvision's operator on CUDA, ours on the CPU."""
    generator = torch.Generator().manual_seed(0)
    side = (12 + 2 * padding - 2 * dilation - 1) // stride + 1
    x = torch.randn(2, 8, 12, 12, generator=generator).to(dtype)
    offset = 2 * torch.randn(2, 18, side, side, generator=generator)
    weight, bias = torch.randn(6, 8, 3, 3, generator=generator), torch.randn(6)
    masks = [torch.rand(2, 9, side, side, generator=generator)] if has_mask else []
    where = {"stride": stride, "padding": padding, "dilation": dilation}

    def run(*inputs):
        inputs = [value.detach().requires_grad_() for value in inputs]
        x, offset, weight, bias, *mask = inputs
        y = deform_conv(x, offset, weight, bias, mask=mask[0] if mask else None, **where)
        grad = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y)
        return y.detach(), *torch.autograd.grad(y, inputs, grad)

    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    same(run, x, offset, weight, bias, *masks, rtol=tolerance, atol=10 * tolerance)


def test_an_offset_that_is_no_number_gives_nan_under_autocast():
    layer = ModulatedDeformConv(4, 6, kernel_size=3, padding=1).to(DEVICE)
    x = torch.randn(1, 4, 9, 9, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.float16):
        assert layer(x).isfinite().all()
    offset = torch.zeros(1, 18, 9, 9, device=DEVICE)
    offset[0, 0, 4, 4] = math.nan
    y = deform_conv(x, offset, layer.weight, padding=1)
    assert y[0, :, 4, 4].isnan().all() and y.isnan().sum() == 6
    assert deform_conv(x[:0], offset[:0], layer.weight, padding=1).shape == (0, 6, 9, 9)
