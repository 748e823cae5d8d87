from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from iou_d2 import get_config
from iou_d2.detectors.views import View, build_view_maker, original_image
from iou_d2.errors import InputError
from views_by_hand import random_image, resized, to_image

IMAGE = random_image(60, 90)
QUICK = "configs/quick/retinanet_shapes.yaml"


def random_boxes(count: int = 50) -> torch.Tensor:
    corners = torch.rand(count, 2, generator=torch.Generator().manual_seed(1)) * 40 - 5
    return torch.cat([corners, corners + torch.rand(count, 2) * 50], dim=1)


def view(height: int, width: int, mirrored: bool = False, box_sizes=None) -> View:
    return View(torch.zeros(3, height, width), (60, 90), mirrored, box_sizes)


@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_come_back_from_a_view(mirrored):
    boxes, other = random_boxes(), view(123, 77, mirrored)
    found = other.boxes_in(view(60, 90), boxes)
    expected = to_image(boxes, other.image, mirrored, IMAGE)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(view(60, 90).boxes_in(other, found), boxes, rtol=1e-5, atol=1e-4)


def test_boxes_in_their_own_view_are_the_same_to_the_last_bit():
    boxes = torch.cat([random_boxes(), torch.full((1, 4), float("nan"))])
    for own in (view(123, 77), view(7, 3, mirrored=True)):
        assert torch.equal(own.boxes_in(own, boxes).nan_to_num(7), boxes.nan_to_num(7))
    assert view(5, 5).boxes_in(view(9, 9), boxes[:0]).shape == (0, 4)


def test_box_sizes_are_those_in_pixels_of_the_image():
    boxes, low, high = random_boxes(200), 15.0, 30.0
    there = Instances((120, 270), pred_boxes=Boxes(boxes), index=torch.arange(len(boxes)))
    kept = view(64, 64, box_sizes=(low, high)).within_sizes(there).index.tolist()
    expected = []
    for index, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        sides = ((x2 - x1) / 3, (y2 - y1) / 2)
        if max(sides) > low and min(sides) < high:
            expected.append(index)
    assert kept == expected and 0 < len(kept) < len(boxes)
    assert view(64, 64).within_sizes(there) is there


def maker(*overrides: str):
    return build_view_maker(get_config(QUICK, list(overrides)))


def test_views_are_each_size_and_its_mirror_image():
    sizes = ("TEST.AUG.MIN_SIZES", "(30, 60, 0, 120)", "TEST.AUG.MAX_SIZE", "150")
    views, chosen = maker(*sizes)(IMAGE)
    assert [x.size for x in views[::2]] == [(30, 45), (60, 90), (60, 90), (100, 150)]
    assert [x.is_mirrored for x in views] == [False, True] * 4
    for index, x in enumerate(views):
        expected = resized(IMAGE, x.size)
        assert torch.equal(x.image, expected.flip(2) if index % 2 else expected)
        assert x.image_size == (60, 90) and x.box_sizes is None
    assert chosen is views[6]  # INPUT.MIN_SIZE_TEST is 128
    assert maker(*sizes, "INPUT.MIN_SIZE_TEST", "0")(IMAGE)[1].size == (60, 90)


def test_squares_have_the_limits_of_their_size():
    square = ("INPUT.AUGMENTATIONS", "['square']", "INPUT.SQUARE_SIZE", "40")
    sizes = ("TEST.AUG.MIN_SIZES", "(20, 64)", "TEST.AUG.BOX_SIZES", "[[32, 1e5], [0, 9.5]]")
    views, chosen = maker(*square, *sizes, "TEST.AUG.FLIP", "False")(IMAGE)
    assert [x.size for x in views] == [(20, 20), (64, 64)] and chosen is views[1]
    assert [x.box_sizes for x in views] == [(32, 1e5), (0, 9.5)]
    assert torch.equal(views[0].image, resized(IMAGE, (20, 20)))


@pytest.mark.parametrize(
    "key, value, others",
    [
        ("MIN_SIZES", "()", ()),
        ("MIN_SIZES", "(-1,)", ()),
        ("MIN_SIZES", "(1.5,)", ()),
        ("MIN_SIZES", "(0,)", ("INPUT.AUGMENTATIONS", "['square']")),
        ("MAX_SIZE", "0", ()),
        ("BOX_SIZES", "[[0, 9]]", ()),
        ("BOX_SIZES", "[[0, 9], [9, 9], [0, 9]]", ()),
        ("BOX_SIZES", "[[0, 9], [-1, 9], [0, 9]]", ()),
        ("BOX_SIZES", "[[0, 9], [1], [0, 9]]", ()),
        ("BOX_SIZES", "[[0, 9], 7, [0, 9]]", ()),
        ("BOX_SIZES", "[[0, 9], ['a', 'b'], [0, 9]]", ()),
    ],
)
def test_sizes_that_no_view_can_have_are_named(key, value, others):
    with pytest.raises(InputError, match=f"TEST.AUG.{key}"):
        maker(f"TEST.AUG.{key}", value, *others)


def test_an_image_that_was_resized_is_read_again(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(IMAGE.permute(1, 2, 0).numpy()).save(path)  # RGB
    small = {"image": resized(IMAGE, (30, 45)), "height": 60, "width": 90}
    assert torch.equal(original_image({**small, "file_name": str(path)}, "RGB"), IMAGE)
    assert torch.equal(original_image({"file_name": str(path)}, "BGR"), IMAGE.flip(0))
    assert torch.equal(original_image(small, "RGB"), small["image"])
    whole = {"image": IMAGE, "height": 60, "width": 90, "file_name": str(tmp_path / "none.png")}
    assert original_image(whole, "RGB") is IMAGE or torch.equal(original_image(whole, "RGB"), IMAGE)


def test_whole_values_are_bytes_and_others_stay_what_they_are():
    found = original_image({"image": IMAGE.float()}, "BGR")
    assert found.dtype == torch.uint8 and torch.equal(found, IMAGE)
    for odd in (IMAGE.float() + 0.5, IMAGE.float() - 300, IMAGE.float() * np.nan):
        assert original_image({"image": odd}, "BGR").dtype == torch.float32


@pytest.mark.parametrize("size", [(2, 400), (400, 2), (1, 1)])
def test_views_of_thin_images_have_a_pixel_at_least(size):
    sides = ("TEST.AUG.MIN_SIZES", "(1, 32)", "TEST.AUG.MAX_SIZE", "64", "TEST.AUG.FLIP", "True")
    views, _ = maker(*sides)(random_image(*size))
    assert len(views) == 4 and all(min(view.size) >= 1 for view in views)
    assert all(view.image.shape == (3, *view.size) for view in views)
