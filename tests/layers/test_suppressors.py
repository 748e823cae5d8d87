"""The compiled loop of IoU-guided NMS against Algorithm 1, torchvision and plain operations."""

from __future__ import annotations

import pytest
import torch
import torchvision

from iou_d2.layers import HAS_EXTENSION
from iou_d2.layers.suppressors import first_suppressors
from iou_d2.ops import nms

compiled = pytest.mark.skipif(not HAS_EXTENSION, reason="iou_d2 is not compiled")


def boxes_of(count, objects, classes, seed=0, shift=0.0):
    """(count, 4) all over an image or close to `objects` places, by falling rank, and classes."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(count) % (objects or count)
    corner = torch.rand(objects or count, 2, generator=generator) * torch.tensor([1000.0, 600.0])
    sides = 30 + 100 * torch.rand(objects or count, 2, generator=generator)
    boxes = torch.cat([corner, corner + sides], dim=1)[place]
    return boxes + torch.randn(count, 4, generator=generator) * 5 + shift, place % classes


def by_hand(boxes, classes, threshold):
    """Algorithm 1 in float64, box by box."""
    iou = torchvision.ops.box_iou(boxes.double(), boxes.double())
    suppressors = torch.full_like(classes, -1)
    for i in range(len(boxes)):
        if suppressors[i] >= 0:
            continue
        gone = (iou[i] > threshold) & (classes == classes[i]) & (suppressors < 0)
        gone[:i] = False
        suppressors[gone] = i
        suppressors[i] = i
    return suppressors


@pytest.mark.parametrize("objects", [0, 4, 40])
@pytest.mark.parametrize("classes", [1, 3])
def test_it_is_algorithm_1(objects, classes):
    for seed in range(5):
        boxes, labels = boxes_of(200, objects, classes, seed)
        found = first_suppressors(boxes, labels, 0.5)
        assert torch.equal(found, by_hand(boxes, labels, 0.5))
        assert len(found.unique()) < 200


@compiled
@pytest.mark.parametrize("count", [1, 1000, 1001, 2500])
@pytest.mark.parametrize("classes", [1, 80])
@pytest.mark.parametrize("objects", [0, 20])
@pytest.mark.parametrize("shift", [0.0, -700.0])
def test_it_keeps_what_torchvision_keeps_and_hands_over_as_plain_operations_do(
    count, classes, objects, shift
):
    boxes, labels = boxes_of(count, min(objects, count), classes, shift=shift)
    found = first_suppressors(boxes, labels, 0.5)
    assert torch.equal(found, nms.first_suppressors(boxes, labels, 0.5))
    if shift == 0:
        falling = torch.arange(count, 0, -1.0)
        keep = torchvision.ops.batched_nms(boxes.clamp(min=0), falling, labels, 0.5)
        found = first_suppressors(boxes.clamp(min=0), labels, 0.5)
        assert torch.equal((found == torch.arange(count)).nonzero().squeeze(1), keep)


@compiled
def test_rounding_is_that_of_torchvision_on_both_sides_of_where_it_changes_its_way():
    """IoUs that are a threshold but for the rounding of the offsets: all of 60 classes differ."""
    for count in (960, 1020):
        generator = torch.Generator().manual_seed(count)
        corner = torch.rand(count // 2, 2, generator=generator) * 1300
        side = 5 + 20 * torch.rand(count // 2, 1, generator=generator)
        first = torch.cat([corner, corner + side], dim=1)
        second = first + side * torch.tensor([1 / 3, 0, 1 / 3, 0])  # an IoU of 1/2
        boxes, labels = torch.cat([first, second]), torch.arange(count) % (count // 2) % 80
        keep = torchvision.ops.batched_nms(boxes, torch.arange(count, 0, -1.0), labels, 0.5)
        assert count // 2 + 50 < len(keep) < count - 50
        found = first_suppressors(boxes, labels, 0.5)
        assert torch.equal((found == torch.arange(count)).nonzero().squeeze(1), keep)


@pytest.mark.parametrize("names", [(-2, -1, 0), (7, 581929, 2**60), (0, 1, 5000)])
def test_many_or_strange_classes_never_meet(names):
    boxes, labels = boxes_of(300, 10, 3)
    expected = by_hand(boxes, labels, 0.5)
    assert torch.equal(first_suppressors(boxes, torch.tensor(names)[labels], 0.5), expected)


def test_no_boxes_and_short_integers():
    boxes, labels = boxes_of(50, 5, 3)
    found = first_suppressors(boxes, labels.int(), 0.5)
    assert torch.equal(found, first_suppressors(boxes, labels, 0.5))
    nothing = torch.zeros(0, dtype=torch.int64)
    assert first_suppressors(torch.zeros(0, 4), nothing, 0.5).shape == (0,)


@compiled
def test_opcheck_and_wrong_arguments():
    boxes, labels = boxes_of(30, 3, 2)
    op = torch.ops.iou_d2.first_suppressors
    torch.library.opcheck(op.default, (boxes, labels, 0.5))
    torch.library.opcheck(op.default, (boxes[:0], labels[:0], 0.5))
    torch.library.opcheck(op.default, (boxes.t().contiguous().t(), labels, 0.5))
    with pytest.raises(ValueError, match=r"classes \(R,\), got \[30, 4\] and \[29\]"):
        op(boxes, labels[1:], 0.5)
    with pytest.raises(TypeError, match="boxes must be float32 and classes int64"):
        op(boxes.double(), labels, 0.5)
