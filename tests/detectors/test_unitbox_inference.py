from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from iou_d2.detectors.dense import DenseNMS
from iou_d2.detectors.unitbox_inference import EllipseFit, PixelNMS, boxes_of, distances_of

SETTINGS = DenseNMS(score_threshold=0.05, topk=100, nms_threshold=0.5, max_detections=100)
NMS = PixelNMS(SETTINGS)
ELLIPSES = EllipseFit(threshold=0.5, max_detections=100)
BOTH = pytest.mark.parametrize("detect", [NMS, ELLIPSES], ids=["nms", "ellipses"])


def at_most(detect, count):
    if isinstance(detect, EllipseFit):
        return replace(detect, max_detections=count)
    return PixelNMS(replace(detect.nms, max_detections=count))


def perfect_maps(objects, classes, size):
    """Maps that know all objects (box, class), by loops: confidence falls from the centre of an
    object to the border of its ellipse, where it is one half."""
    height, width = size
    logits = torch.full((classes, height, width), -9.0)
    distances = torch.zeros(4, height, width)
    for (x1, y1, x2, y2), index in objects:
        for row in range(height):
            for column in range(width):
                x, y = column + 0.5, row + 0.5
                u = (x - (x1 + x2) / 2) / ((x2 - x1) / 2)
                v = (y - (y1 + y2) / 2) / ((y2 - y1) / 2)
                if u * u + v * v < 1:
                    logits[index, row, column] = 5 - 5 * (u * u + v * v)
                    distances[:, row, column] = torch.tensor([y - y1, y2 - y, x - x1, x2 - x])
    return logits, distances


def rows_of(detections) -> list[tuple]:
    """Detections as (class, x1, y1, x2, y2) in a fixed order."""
    boxes = detections.pred_boxes.tensor.tolist()
    return sorted((c, *box) for c, box in zip(detections.pred_classes.tolist(), boxes))


def test_distances_are_top_bottom_left_right():
    point, box = torch.tensor([3.0, 7.0]), torch.tensor([1.0, 2.0, 11.0, 20.0])
    assert distances_of(point, box).tolist() == [5, 13, 2, 8]
    assert boxes_of(point, torch.tensor([5.0, 13, 2, 8])).tolist() == [1, 2, 11, 20]
    assert distances_of(torch.tensor([0.0, 21.0]), box).tolist() == [19, -1, -1, 11]


def test_boxes_and_distances_are_inverses():
    points, boxes = torch.rand(50, 2).double() * 99, torch.rand(50, 4).double() * 99
    torch.testing.assert_close(boxes_of(points, distances_of(points, boxes)), boxes)
    assert boxes_of(points[:0], distances_of(points[:0], boxes[:0])).shape == (0, 4)


@BOTH
def test_perfect_maps_give_exact_boxes(detect):
    objects = [
        ((3.25, 4.5, 30.75, 21.0), 0),
        ((40.0, 2.0, 52.5, 38.25), 1),
        ((0.0, 30.0, 20.0, 48.0), 0),  # touches two borders of the image
        ((54.0, 40.0, 57.5, 43.5), 1),
    ]
    found = detect(*perfect_maps(objects, 2, (48, 64)))
    expected = torch.tensor(sorted((c, *box) for box, c in objects))
    torch.testing.assert_close(torch.tensor(rows_of(found)), expected, atol=1e-4, rtol=0)
    assert found.image_size == (48, 64)
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
    # The score is the confidence of the pixel nearest to the centre.
    nearest = 1 / (1 + math.exp(-(5 - 5 * ((0.5 / 13.75) ** 2 + (0.25 / 8.25) ** 2))))
    assert found.scores.max().item() == pytest.approx(nearest, abs=2e-3)


@BOTH
@pytest.mark.parametrize("classes", [1, 3])
def test_maps_without_objects_give_empty_detections(detect, classes):
    found = detect(*perfect_maps([], classes, (10, 12)))
    assert len(found) == 0 and found.pred_boxes.tensor.shape == (0, 4)
    assert found.scores.shape == found.pred_classes.shape == (0,)


@BOTH
def test_a_pixel_that_is_not_a_number_is_no_detection(detect):
    logits, distances = perfect_maps([((3.0, 3.0, 11.0, 11.0), 0)], 1, (16, 32))
    logits[0, :, 20:] = math.nan
    assert rows_of(detect(logits, distances)) == [(0, 3, 3, 11, 11)]


@BOTH
def test_boxes_that_are_empty_or_not_finite_take_no_place(detect):
    objects = [((10.0 * i, 2.0, 10.0 * i + 7, 9.0), 0) for i in range(5)]
    logits, distances = perfect_maps(objects, 1, (12, 52))
    logits += torch.linspace(1, 0, 52)  # the more to the left, the better
    distances[2:, :, :10] = 0
    distances[0, :, 10:20] = math.nan
    distances[3, :, 20:30] = math.inf
    limited = at_most(detect, 2)
    assert [row[1] for row in rows_of(limited(logits, distances))] == [30, 40]


@BOTH
def test_only_the_best_are_kept(detect):
    objects = [((10.0 * i, 2.0, 10.0 * i + 7 + i, 9.0), 0) for i in range(4)]
    logits, distances = perfect_maps(objects, 1, (12, 48))
    logits += torch.linspace(0, 1, 48)  # the more to the right, the better
    limited = at_most(detect, 2)
    assert [row[1] for row in rows_of(limited(logits, distances))] == [20, 30]
    assert len(at_most(detect, -1)(logits, distances)) == 4


def test_one_large_object_does_not_crowd_out_a_small_one():
    objects = [((0.0, 0.0, 60.0, 60.0), 0), ((70.0, 5.0, 76.0, 11.0), 0)]
    logits, distances = perfect_maps(objects, 1, (64, 80))
    logits[0, :62, :62] += 3
    few = PixelNMS(replace(SETTINGS, topk=10))
    assert {row[1] for row in rows_of(few(logits, distances))} == {0, 70}


def test_nms_is_by_class():
    box = (2.0, 2.0, 12.0, 12.0)
    found = NMS(*perfect_maps([(box, 0), (box, 1)], 2, (16, 16)))
    assert rows_of(found) == [(0, *box), (1, *box)]


def regions(*rows: str):
    """Maps whose confident pixels are drawn as #; every pixel's box is the pixel itself."""
    logits = torch.tensor([[6.0 if c == "#" else -6.0 for c in row] for row in rows])
    return logits[None], torch.full((4, *logits.shape), 0.5)


@pytest.mark.parametrize(
    ("rows", "centers"),
    [
        (["....", ".#..", "...."], [(1, 1)]),
        ([".....", "####.", "....."], [(2, 1), (1, 1)]),  # a line: either pixel is its middle
        ([".#.", ".#.", ".#.", ".#.", ".#."], [(1, 2)]),
        (["##.", "##.", "..."], [(0, 0), (1, 0), (0, 1), (1, 1)]),
        (["#####", "#####", "#####"], [(2, 1)]),
        (["######", "#....#", "#....#", "#....#", "######"], [(2, 2), (3, 2)]),
    ],
    ids=["pixel", "row", "column", "square", "all", "ring"],
)
def test_an_ellipse_has_the_centre_of_its_region(rows, centers):
    found = ELLIPSES(*regions(*rows))
    ((_, x, y, *_),) = rows_of(found)
    assert (int(x), int(y)) in centers
    # The region's best, also where its centre is a hole.
    assert found.scores.tolist() == pytest.approx([1 / (1 + math.exp(-6))])


def test_a_region_inside_another_one_is_found_by_itself():
    ring = ["#" * 11, *["#.........#"] * 4, "#....#....#", *["#.........#"] * 4, "#" * 11]
    logits, distances = regions(*ring)
    logits[0, 5, 5] = 9
    found = ELLIPSES(logits, distances)
    assert [row[1:3] for row in rows_of(found)] == [(5, 5), (5, 5)]
    assert found.scores.tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (9, 6)])


def test_an_arc_is_found_at_its_centroid_as_its_ellipse_is_centred_outside():
    angles = [t / 100 for t in range(-78, 79)]
    arc = {(round(20 - 20 * math.cos(t)), 15 + round(20 * math.sin(t))) for t in angles}
    logits, distances = regions(*["." * 30] * 8)
    for row, column in arc:
        logits[0, row, column] = 6
    ((_, x, y, *_),) = rows_of(ELLIPSES(logits, distances))
    assert x == round(sum(column for _, column in arc) / len(arc))
    assert y == round(sum(row for row, _ in arc) / len(arc))


def test_regions_are_connected_over_corners():
    assert len(ELLIPSES(*regions("##..", "##..", "..##", "..##"))) == 1
    assert len(ELLIPSES(*regions("##..", "##..", "....", "..##", "..##"))) == 2
