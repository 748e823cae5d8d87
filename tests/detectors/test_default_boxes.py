"""Default boxes against loops over the published formulas, the published tables and torchvision."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from iou_d2 import get_config
from iou_d2.detectors.default_boxes import CLIPS, build_default_boxes, default_sizes
from iou_d2.errors import InputError

MAPS = {300: [38, 19, 10, 5, 3, 1], 512: [64, 32, 16, 8, 4, 2, 1]}
STRIDES = [8, 16, 32, 64, 64, 64, 64]


def generator_of(config: str, *overrides: str):
    cfg = get_config(config, overrides)
    side = cfg.INPUT.SQUARE_SIZE
    maps = MAPS[side]
    return build_default_boxes(cfg, STRIDES[: len(maps)]), [torch.zeros(1, 1, x, x) for x in maps]


def boxes_by_hand(maps, steps, sizes, ratios, clip, side):
    """(cx, cy, w, h) of Caffe's PriorBox, box after box."""
    boxes = []
    for cells, step, (small, large), of_level in zip(maps, steps, sizes, ratios):
        for row in range(cells):
            for column in range(cells):
                cx, cy = (column + 0.5) * step, (row + 0.5) * step
                shapes = [(small, small), (math.sqrt(small * large),) * 2]
                for ratio in of_level:
                    shapes.append((small * math.sqrt(ratio), small / math.sqrt(ratio)))
                    shapes.append((small * math.sqrt(1 / ratio), small / math.sqrt(1 / ratio)))
                for w, h in shapes:
                    if clip in ("sides", "centers_and_sides"):
                        w, h = min(w, side), min(h, side)
                    if clip == "centers_and_sides":
                        cx, cy = min(cx, side), min(cy, side)
                    corners = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                    if clip == "corners":
                        corners = [min(max(x, 0), side) for x in corners]
                    boxes.append(corners)
    return boxes


# The table of the paper's code, which cuts to whole pixels.
TABLE = {
    "ssd300_VGG16_voc": (8732, [30, 60, 111, 162, 213, 264, 315]),
    "ssd300_VGG16_coco": (8732, [21, 45, 99, 153, 207, 261, 315]),
    "ssd512_VGG16_voc": (24564, [35.84, 76.8, 153.6, 230.4, 307.2, 384, 460.8, 537.6]),
    "ssd512_VGG16_coco": (24564, [20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8, 542.72]),
}


@pytest.mark.parametrize("config", list(TABLE))
@pytest.mark.parametrize("truncate", [True, False])
def test_sizes_are_the_published_ones(config, truncate):
    cfg = get_config(config)
    ratios = (cfg.MODEL.SSD.FIRST_RATIO, cfg.MODEL.SSD.MIN_RATIO, cfg.MODEL.SSD.MAX_RATIO)
    count, table = TABLE[config]
    table = [int(size) for size in table] if truncate else table
    found = default_sizes(cfg.INPUT.SQUARE_SIZE, len(table) - 1, ratios, truncate)
    assert [x for x, _ in found] == pytest.approx(table[:-1])
    assert [x for _, x in found] == pytest.approx(table[1:])
    generator, features = generator_of(config)
    assert len(generator(features)) == count


def test_the_step_between_sizes_is_rounded_down():
    # 17.5 percent for SSD300 on VOC, where the code has 17.
    assert [x for x, _ in default_sizes(100, 6, (10, 20, 90), False)] == [10, 20, 37, 54, 71, 88]
    assert default_sizes(200, 1, (10, 20, 90), True) == [(20, 40)]
    assert default_sizes(200, 2, (10, 20, 90), True) == [(20, 40), (40, 180)]


@pytest.mark.parametrize("clip", list(CLIPS))
@pytest.mark.parametrize("config", ["ssd300_VGG16_voc", "ssd512_VGG16_coco"])
def test_boxes_are_those_of_a_loop_over_the_formulas(config, clip):
    generator, features = generator_of(config, "MODEL.SSD.CLIP", clip)
    cfg = get_config(config)
    side, table = cfg.INPUT.SQUARE_SIZE, [int(x) for x in TABLE[config][1]]
    steps = {300: [8, 16, 32, 64, 100, 300], 512: [8, 16, 32, 64, 128, 256, 512]}[side]
    expected = boxes_by_hand(
        MAPS[side], steps, list(zip(table, table[1:])), cfg.MODEL.SSD.ASPECT_RATIOS, clip, side
    )
    found = generator(features).tensor
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=0)


def test_boxes_are_those_of_torchvision():
    peer = DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
        scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        steps=[8, 16, 32, 64, 100, 300],
    )
    generator, features = generator_of("ssd300_VGG16_coco", "MODEL.SSD.CLIP", "sides")
    images = ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)])
    (expected,) = peer(images, features)
    torch.testing.assert_close(generator(features).tensor, expected, atol=1e-3, rtol=0)
    assert generator.num_cell_boxes == peer.num_anchors_per_location()


def test_other_maps_and_steps_of_the_features():
    """A map of two rows and three columns, where no step is given."""
    cfg = get_config("quick/ssd_shapes", ["MODEL.SSD.ASPECT_RATIOS", "[[2]]"])
    found = build_default_boxes(cfg, [16])([torch.zeros(1, 1, 2, 3)]).tensor
    assert len(found) == 2 * 3 * 4
    centers = (found[:, :2] + found[:, 2:]) / 2
    assert centers[::4].tolist() == [[8, 8], [24, 8], [40, 8], [8, 24], [24, 24], [40, 24]]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("MODEL.SSD.STEPS", "[8, 16]"), "STEPS is for 2 levels, but .* has 6"),
        (("MODEL.SSD.ASPECT_RATIOS", "[[2]]"), "ASPECT_RATIOS is for 1 levels, but .* has 6"),
        (("MODEL.SSD.FIRST_RATIO", "0"), r"are \(0, 20, 90\) percent"),
        (("MODEL.SSD.MIN_RATIO", "91"), r"are \(10, 91, 90\) percent"),
        (("INPUT.SQUARE_SIZE", "5"), "SQUARE_SIZE 5, which leaves"),
        (("MODEL.SSD.CLIP", "all"), "MODEL.SSD.CLIP is one of none, sides.*'all'"),
    ],
)
def test_wrong_settings_are_named(overrides, sentence):
    with pytest.raises(InputError, match=sentence):
        generator_of_voc = get_config("ssd300_VGG16_voc", overrides)
        build_default_boxes(generator_of_voc, STRIDES[:6])
