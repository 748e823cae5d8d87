from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from iou_d2.engine.export.agreement import agreement
from iou_d2.engine.export.candidates import Candidates, best, suppress, top, usable
from iou_d2.engine.export.deform import SampledDeformConv
from iou_d2.engine.export.proposals import positive
from iou_d2.ops.nms import batched_nms


def test_top_takes_the_first_of_equal_scores_and_fills_up():
    scores = torch.tensor([[0.5, 0.0, 0.7, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]])
    found, index = top(scores, 4)
    assert torch.equal(found, torch.tensor([[0.7, 0.5, 0.5, 0.5], [0, 0, 0, 0]]))
    assert index.tolist() == [[2, 0, 3, 4], [0, 0, 0, 0]]
    found, index = top(scores[:, :2], 4)
    assert found.tolist() == [[0.5, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_suppression_of_a_batch_is_that_of_its_images(threshold):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(4, 80, 2, generator=generator) * 60 - 20
    boxes = torch.cat([corner, corner + torch.rand(4, 80, 2, generator=generator) * 40], dim=2)
    scores = torch.rand(4, 80, generator=generator)
    scores[1] = 0
    scores[2, 40:] = 0
    classes = torch.randint(80, (4, 80), generator=generator) % 3
    mask = suppress(boxes, scores, classes, 3, threshold)
    for image in range(4):
        there = (scores[image] > 0).nonzero().squeeze(1)
        parts = (x[image, there] for x in (boxes, scores, classes))
        keep = there[batched_nms(*parts, threshold)]
        assert mask[image].nonzero().squeeze(1).tolist() == keep.sort().values.tolist()


def test_a_program_keeps_two_boxes_or_one_or_none():
    class Suppress(torch.nn.Module):
        def forward(self, boxes, scores, groups):
            return suppress(boxes, scores, groups, 2, 0.5)

    corner = torch.tensor([[[0.0, 0], [1, 0], [40, 40]]])
    inputs = (torch.cat([corner, corner + 20], dim=2), torch.ones(1, 3), torch.zeros(1, 3).long())
    program = torch.export.export(Suppress(), inputs).module()
    for scores, kept in (
        ([0.9, 0.8, 0.7], [1, 0, 1]),
        ([0.8, 0.9, 0], [0, 1, 0]),
        ([0] * 3, [0] * 3),
    ):
        found = program(inputs[0], torch.tensor([scores]).float(), inputs[2])
        assert found.tolist() == [kept]


def test_objectness_becomes_positive_and_keeps_its_order():
    logits = torch.tensor(
        [-1e30, -90.0, -17.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 17.0, 17.1, 90.0, 1e30]
    )
    found = positive(logits)
    assert (found > 0).all() and (found.diff() > 0).all()
    assert positive(torch.tensor([torch.nan, torch.inf, -torch.inf])).tolist() == [0, 0, 0]


def test_a_box_that_is_not_finite_is_none():
    boxes = torch.tensor([[[0.0, 0, 1, 1], [0, 0, torch.inf, 1], [0, torch.nan, 1, 1]]])
    scores, classes = torch.tensor([[0.2, 0.9, 0.8]]), torch.tensor([[1, 0, 0]])
    found = best(usable(Candidates(boxes, scores, classes, {})), 2)
    assert found.classes.tolist() == [[1, -1]]
    assert found.boxes.tolist() == [[[0, 0, 1, 1], [0, 0, 0, 0]]]


@pytest.mark.parametrize(
    ("groups", "offset_groups", "stride", "padding", "dilation", "masked"),
    [
        (1, 1, 1, 1, 1, True),
        (1, 1, 2, 1, 1, False),
        (4, 2, 1, 2, 2, True),
        (2, 4, (2, 1), (0, 1), (1, 2), True),
    ],
)
def test_sampled_deformable_convolution_is_torchvisions(
    groups, offset_groups, stride, padding, dilation, masked
):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 8, 9, 12), torch.randn(12, 8 // groups, 3, 3), torch.randn(12)
    size = F.conv2d(x, weight, None, stride, padding, dilation, groups).shape[-2:]
    offset = 5 * torch.randn(2, 18 * offset_groups, *size)  # far out of the map too
    mask = torch.rand(2, 9 * offset_groups, *size) if masked else None
    arguments = (x, offset, weight, bias, stride, padding, dilation, mask)
    expected = torchvision.ops.deform_conv2d(*arguments)
    with SampledDeformConv():
        found = torchvision.ops.deform_conv2d(*arguments)
    assert not torch.equal(found, expected)  # or else the operator was not replaced
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def detections(boxes, scores, classes=None) -> dict:
    classes = np.zeros(len(boxes), dtype=np.int64) if classes is None else np.array(classes)
    return {
        "boxes": np.array(boxes, dtype=np.float32).reshape(-1, 4),
        "scores": np.array(scores, dtype=np.float32),
        "classes": classes,
    }


def test_agreement_finds_what_is_missing_moved_or_of_another_class():
    ours = detections([[0, 0, 10, 10], [20, 20, 30, 30]], [0.9, 0.5])
    same = detections(ours["boxes"][::-1], [0.5, 0.9])
    assert agreement([ours], [same], 100, 0.05) == (2, 0, 0, 0.0, 0.0)
    one = detections([[0, 0, 10, 10]], [0.9])
    assert agreement([ours], [one], 100, 0.05)[:3] == (1, 1, 0)
    assert agreement([one], [ours], 100, 0.05)[:3] == (1, 0, 1)
    moved = detections([[0, 0, 10, 10.25], [20, 20, 30, 30]], [0.9, 0.5])
    found = agreement([ours], [moved], 100, 0.05)
    assert found.boxes == 0.25 and not found.holds()
    other = detections(ours["boxes"], [0.9, 0.5], [0, 1])
    assert agreement([ours], [other], 100, 0.05)[:3] == (1, 1, 1)


def test_agreement_forgives_what_is_at_an_edge():
    ours = detections([[0, 0, 10, 10], [20, 20, 30, 30]], [0.9, 0.050001])
    one = detections([[0, 0, 10, 10]], [0.9])
    assert agreement([ours], [one], 100, 0.05).holds()
    # The last of a full list may be another one of the same score.
    other = detections([[0, 0, 10, 10], [50, 50, 60, 60]], [0.9, 0.5])
    last = detections([[0, 0, 10, 10], [20, 20, 30, 30]], [0.9, 0.5])
    assert agreement([last], [other], 2, 0.05).holds()
    assert not agreement([last], [other], 3, 0.05).holds()
