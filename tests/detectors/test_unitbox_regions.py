"""Which pixels are an object's."""

from __future__ import annotations

import math

import pytest
import torch

from iou_d2.detectors.unitbox import REGIONS, assign_pixels
from unitbox_by_hand import owner_by_hand


def random_boxes(count: int, side: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = (torch.rand(count, 2, generator=generator) * 1.2 - 0.2) * side
    size = torch.rand(count, 2, generator=generator).square() * side
    return torch.cat([corner, corner + size], dim=1)


@pytest.mark.parametrize("region", ["box", "ellipse"])
def test_pixels_belong_to_the_smallest_box_around_them(region):
    # Some overlap, some lie partly or wholly outside, some are smaller than a pixel.
    boxes = torch.cat([random_boxes(25, 30), random_boxes(5, 30) * torch.tensor([1, 1, 0.3, 1.0])])
    owner = assign_pixels(boxes, (24, 31), REGIONS[region])
    expected = [
        [owner_by_hand(boxes.double().tolist(), i, j, region) for j in range(31)] for i in range(24)
    ]
    assert owner.tolist() == expected
    assert owner.unique().numel() > 12


@pytest.mark.parametrize("region", ["box", "ellipse"])
def test_objects_without_a_pixel(region):
    tiny = torch.tensor([[3.6, 3.6, 4.4, 4.4], [5.0, 5.0, 5.0, 9.0], [9.0, 9.0, 2.0, 2.0]])
    region = REGIONS[region]
    assert (assign_pixels(tiny, (12, 12), region) == -1).all()
    assert (assign_pixels(tiny[:0], (12, 12), region) == -1).all()
    around_a_centre = torch.tensor([[3.4, 7.4, 3.6, 7.6]])
    assert (assign_pixels(around_a_centre, (12, 12), region) == 0).nonzero().tolist() == [[7, 3]]


@pytest.mark.parametrize("region", ["box", "ellipse"])
def test_a_box_that_is_not_finite_takes_no_pixel(region):
    bad = torch.tensor([[math.nan, 0, 4, 4], [0, 0, math.inf, 4], [2.0, 2, 9, 9]])
    expected = assign_pixels(bad[2:], (12, 12), REGIONS[region])
    owner = assign_pixels(bad, (12, 12), REGIONS[region])
    assert torch.equal(owner, torch.where(expected == 0, 2, -1)) and (owner == 2).any()


def test_of_equal_boxes_the_first_wins():
    boxes = torch.tensor([[0.0, 0, 4, 4], [2.0, 0, 6, 4], [0.0, 0, 4, 4]])
    assert assign_pixels(boxes, (1, 6), REGIONS["box"]).tolist() == [[0, 0, 0, 0, 1, 1]]
