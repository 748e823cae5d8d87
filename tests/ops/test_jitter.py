from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from iou_d2.ops import jitter
from iou_d2.ops.jitter import jitter_offsets, jittered_boxes


@pytest.fixture(scope="module")
def offsets():
    return jitter_offsets()


def numpy_iou(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    inner = np.prod(np.clip(np.minimum(a, b)[:, 2:] - np.maximum(a, b)[:, :2], 0, None), axis=1)
    areas = [np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (a, b)]
    return inner / (areas[0] + areas[1] - inner)


def draw(gt, size, offsets, per_gt=5000, per_image=10**6):
    torch.manual_seed(0)
    return jittered_boxes(gt, size, offsets, per_gt=per_gt, per_image=per_image)


def test_offsets_are_uniform_in_iou(offsets):
    unit = torch.tensor([[0.0, 0, 1, 1]]).expand(len(offsets), 4)
    ious = numpy_iou(unit + offsets, unit)
    histogram, _ = np.histogram(ious + 1e-7, bins=50, range=(0.5, 1.0))
    assert offsets.shape == (10_000, 4) and (histogram == 200).all()
    # No side is preferred, nor left and top to right and bottom.
    torch.testing.assert_close(
        (offsets * torch.tensor([-1.0, -1, 1, 1])).mean(0),
        torch.full((4,), 0.026),
        atol=4e-3,
        rtol=0,
    )


def test_they_are_the_same_when_drawn_anew_and_belong_to_who_asks(offsets):
    with torch.inference_mode():
        jitter._offsets.cache_clear()
        assert torch.equal(offsets, jitter_offsets())
    mine = jitter_offsets()
    assert not mine.is_inference()
    mine.zero_()
    assert torch.equal(offsets, jitter_offsets())


@pytest.mark.parametrize(
    "box", [[100.0, 80, 300, 240], [900.0, 400, 910, 590], [511.3, 77.1, 513, 79]]
)
def test_rois_are_uniform_in_iou_and_their_target_is_their_iou(offsets, box):
    gt = torch.tensor([box])
    boxes, index, ious = draw(gt, (800, 1333), offsets)
    assert len(boxes) > 4990 and (index == 0).all()
    assert kstest(ious, "uniform", args=(0.5, 0.5)).pvalue > 0.01
    np.testing.assert_allclose(ious, numpy_iou(boxes, gt[index]), atol=1e-4)


@pytest.mark.parametrize(
    "box",
    [
        [0.0, 0, 1333, 800],  # the whole image
        [1300.0, 790, 1333, 800],  # in the corner
        [700.0, 500, 700.01, 500.01],  # tiny
        [-50.0, -50, 60, 60],  # outside by more than a half
    ],
)
def test_no_roi_is_under_half_or_outside(offsets, box):
    gt = torch.tensor([box])
    boxes, index, ious = draw(gt, (800, 1333), offsets)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 1333).all() and (boxes[:, 3] <= 800).all()
    assert (ious >= 0.5).all() and (ious <= 1).all()
    np.testing.assert_allclose(ious, numpy_iou(boxes, gt[index]), atol=2e-3)
    assert (len(boxes) == 0) == (box[0] < 0)


def test_without_ground_truth_or_with_one_without_area_there_is_none(offsets):
    for gt in (torch.zeros(0, 4), torch.tensor([[5.0, 5, 5, 9]]), torch.tensor([[9.0, 5, 5, 9]])):
        boxes, index, ious = draw(gt, (64, 64), offsets)
        assert boxes.shape == (0, 4) and index.shape == ious.shape == (0,)


def test_the_numbers_are_those_asked_for(offsets):
    gt = torch.tensor([[10.0, 10, 50, 40], [100.0, 100, 180, 190], [20.0, 150, 90, 210]])
    _, index, _ = draw(gt, (256, 256), offsets, per_gt=7, per_image=100)
    assert index.bincount().tolist() == [7, 7, 7]
    _, index, _ = draw(gt, (256, 256), offsets, per_gt=1000, per_image=900)
    assert len(index) == 900 and (index.bincount() > 230).all()
    again = jittered_boxes(gt, (256, 256), offsets, per_gt=7, per_image=100)
    more = jittered_boxes(gt, (256, 256), offsets, per_gt=7, per_image=100)
    assert not torch.equal(again[0], more[0])


def test_a_lower_least_iou():
    offsets = jitter_offsets(0.3, per_step=20)
    boxes, _, ious = jittered_boxes(
        torch.tensor([[50.0, 50, 90, 90]]),
        (200, 200),
        offsets,
        per_gt=4000,
        per_image=4000,
        min_iou=0.3,
    )
    assert len(offsets) == 1400
    assert kstest(ious, "uniform", args=(0.3, 0.7)).pvalue > 0.001
