"""What configs can match, against Detectron2's anchors and IoU and against the assigners."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.structures import Boxes, pairwise_iou

from iou_d2 import get_config
from iou_d2.data.coverage import Resize, SquareResize, matching_of, resize_of, resized
from iou_d2.data.matching import Pixels
from iou_d2.data.statistics import Objects
from iou_d2.detectors.default_boxes import build_default_boxes
from iou_d2.detectors.point_detector import build_assigner, point_offset
from iou_d2.errors import InputError
from iou_d2.ops.points import PointGrid

WIDTH, HEIGHT = 150, 100  # padded to 160 x 128


def random_boxes(count: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([WIDTH, HEIGHT])
    corners = torch.rand(count, 2, generator=generator) * scale * 0.98
    sides = 1 + torch.rand(count, 2, generator=generator) ** 2 * (scale - 1)
    return torch.cat([corners, torch.minimum(corners + sides, scale)], dim=1).double()


def ssd_boxes(config: str, maps: list[int]) -> Boxes:
    cfg = get_config(config, ["MODEL.DEVICE", "cpu"])
    strides = [8, 16, 32, 64, 128, 256, 512][: len(maps)]
    return build_default_boxes(cfg, strides)([torch.zeros(1, 1, x, x) for x in maps])


@pytest.mark.parametrize(
    ("config", "maps"),
    [
        ("ssd300_VGG16_voc", [38, 19, 10, 5, 3, 1]),
        ("ssd512_VGG16_coco", [64, 32, 16, 8, 4, 2, 1]),
        ("quick/ssd_own_data", [40, 20, 10, 5, 3]),
        ("quick/ssd_shapes", [16, 8, 4, 2]),
    ],
)
def test_the_best_default_box_is_that_of_all(config, maps):
    cfg = get_config(config)
    side = cfg.INPUT.SQUARE_SIZE
    assert resize_of(cfg) == SquareResize(side)
    boxes = random_boxes(200) / torch.tensor([WIDTH, HEIGHT] * 2) * side
    expected = pairwise_iou(Boxes(boxes.float()), ssd_boxes(config, maps)).amax(dim=1).numpy()
    matching = matching_of(cfg)
    found = matching.measure(boxes.numpy(), np.full((200, 2), float(side)))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert matching.threshold == 0.5 and 0 < (found >= 0.5).sum() < 200


def test_a_square_is_not_as_wide_as_the_image():
    objects = Objects(
        np.array([[30.0, 20, 60, 40]]),
        np.zeros(1),
        np.zeros(1, dtype=int),
        np.array([[90.0, 60]]),
        0,
    )
    boxes, sizes = resized(objects, SquareResize(180))
    assert boxes.tolist() == [[60, 60, 120, 120]] and sizes.tolist() == [[180, 180]]


def feature_maps(strides: list[int]) -> list[torch.Tensor]:
    return [torch.zeros(1, 1, -(-128 // stride), -(-160 // stride)) for stride in strides]


def image_sizes(boxes: torch.Tensor) -> np.ndarray:
    return np.tile([[WIDTH, HEIGHT]], (len(boxes), 1)).astype(float)


@pytest.mark.parametrize(
    ("config", "strides", "offset", "threshold"),
    [
        ("quick/retinanet_own_data", [8, 16, 32, 64, 128], "0.0", 0.5),
        ("quick/retinanet_own_data", [8, 16, 32, 64, 128], "0.5", 0.5),
        ("retinanet_R_50_FPN_1x", [8, 16, 32, 64, 128], "0.0", 0.5),
        ("faster_rcnn_R_50_FPN_1x", [4, 8, 16, 32, 64], "0.0", 0.7),
    ],
)
def test_the_best_anchor_is_that_of_all_anchors(config, strides, offset, threshold):
    cfg = get_config(config, ["MODEL.ANCHOR_GENERATOR.OFFSET", offset, "MODEL.DEVICE", "cpu"])
    generator = build_anchor_generator(cfg, [ShapeSpec(stride=stride) for stride in strides])
    boxes = random_boxes()
    anchors = Boxes.cat(generator(feature_maps(strides)))
    expected = pairwise_iou(Boxes(boxes.float()), anchors).amax(dim=1).numpy()
    matching = matching_of(cfg)
    found = matching.measure(boxes.numpy(), image_sizes(boxes))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert matching.threshold == threshold
    assert 0 < (found >= threshold).sum() < len(boxes)


@pytest.mark.parametrize("offset", ["0.0", "0.5"])
@pytest.mark.parametrize("radius", ["0.0", "1.5"])
def test_fcos_has_as_many_points_as_its_assigner_takes(offset, radius):
    key = "MODEL.POINT_DETECTOR"
    cfg = get_config(
        "quick/fcos_shapes",
        [f"{key}.POINT_OFFSET", offset, f"{key}.CENTER_SAMPLING_RADIUS", radius],
    )
    strides, boxes = [8, 16, 32, 64], random_boxes()
    points = PointGrid(strides, point_offset(cfg))(feature_maps(strides))
    assigner = build_assigner(cfg)
    # One object at a time: they do not compete.
    expected = [int((assigner(points, strides, box[None]) >= 0).sum()) for box in boxes]
    found = matching_of(cfg).measure(boxes.numpy(), image_sizes(boxes))
    assert found.tolist() == expected
    assert min(expected) == 0 and max(expected) > 1


def test_atss_has_its_candidates_inside_counted():
    cfg = get_config("quick/atss_shapes")
    strides, boxes = [8, 16, 32, 64], random_boxes()
    points = PointGrid(strides, point_offset(cfg))(feature_maps(strides))
    middle = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    expected = torch.zeros(len(boxes), dtype=torch.int64)
    for level in points:
        nearest = (level - middle).norm(dim=2).topk(min(9, len(level)), largest=False).indices
        corners = torch.cat(
            [level[nearest] - boxes[:, None, :2], boxes[:, None, 2:] - level[nearest]], 2
        )
        expected += (corners > 0.01).all(dim=2).sum(dim=1)
    found = matching_of(cfg).measure(boxes.numpy(), image_sizes(boxes))
    # Grids of one to three rows have other nearest points than the 3 x 3.
    difference = np.abs(found - expected.numpy())
    assert difference.mean() < 0.5 and difference.max() <= 5
    assert ((found > 0) == (expected.numpy() > 0)).all()
    assigner = build_assigner(cfg)
    taken = [bool((assigner(points, strides, box[None]) >= 0).any()) for box in boxes]
    assert not any(now and not can for now, can in zip(taken, found))


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1000, 100), (33, 77)])
def test_the_resize_is_detectron2s(size):
    image = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    expected = ResizeShortestEdge([240], 512, "choice").get_transform(image)
    factors = Resize(240, 512)(np.array([size], dtype=float))[0]
    assert (factors * size).tolist() == pytest.approx([expected.new_w, expected.new_h])


def test_the_middle_of_the_training_sizes_and_the_crop_are_taken():
    assert resize_of(get_config("quick/retinanet_own_data")) == Resize(320, 640)
    assert resize_of(get_config("quick/retinanet_small_objects")) == Resize(256, 320, (128, 128))


def test_unitbox_wants_a_cell():
    pixels = matching_of(get_config("quick/unitbox_shapes"))
    assert pixels == Pixels(8)
    boxes = np.array([[0, 0, 8, 20], [0, 0, 7.9, 20]])
    assert pixels.measure(boxes, image_sizes(boxes)).tolist() == [1, 7.9 / 8]


def test_no_objects_are_covered_by_anything():
    for config in ("retinanet", "fcos", "atss", "unitbox"):
        matching = matching_of(get_config(f"quick/{config}_shapes"))
        assert len(matching.measure(np.zeros((0, 4)), np.zeros((0, 2)))) == 0


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("MODEL.META_ARCHITECTURE", "PanopticFPN", "Panoptic"),
        ("MODEL.META_ARCHITECTURE", "StandaloneIoUNet", "StandaloneIoUNet"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN", "RRPN"),
        ("MODEL.RPN.IN_FEATURES", "('stage3',)", "feature stage3"),
        ("MODEL.RPN.IOU_LABELS", "(0, -1, 0)", "No anchor"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[]", "No anchor"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16]]", "SIZES is for 2 levels"),
    ],
)
def test_what_cannot_be_judged_is_named(key, value, sentence):
    with pytest.raises(InputError, match=sentence):
        matching_of(get_config("quick/faster_rcnn_own_data", [key, value]))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("MODEL.SSD.CLIP", "sides"), "CLIP sides are not looked at"),
        (("MODEL.SSD.ASPECT_RATIOS", "[[2]]"), "other levels"),
        (("MODEL.SSD.STEPS", "[]"), "stride of the feature conv4_3"),
    ],
)
def test_what_cannot_be_judged_of_ssd_is_named(overrides, sentence):
    with pytest.raises(InputError, match=sentence):
        matching_of(get_config("ssd300_VGG16_voc", overrides))


def test_the_best_anchor_of_refinedet_is_that_of_all():
    cfg = get_config("refinedet320_VGG16_voc")
    generator = build_anchor_generator(cfg, [ShapeSpec(stride=x) for x in (8, 16, 32, 64)])
    anchors = Boxes.cat(generator([torch.zeros(1, 1, x, x) for x in (40, 20, 10, 5)]))
    boxes = random_boxes(200) / torch.tensor([WIDTH, HEIGHT] * 2) * 320
    expected = pairwise_iou(Boxes(boxes.float()), anchors).amax(dim=1).numpy()
    matching = matching_of(cfg)
    found = matching.measure(boxes.numpy(), np.full((200, 2), 320.0))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert matching.threshold == 0.5
