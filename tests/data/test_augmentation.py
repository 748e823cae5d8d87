"""SSD's augmentations by their definitions, and through Detectron2's mapper."""

from __future__ import annotations

import colorsys

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from iou_d2 import get_config
from iou_d2.data import augmentation
from iou_d2.data.augmentation import (
    CROP_IOUS,
    CROP_RATIOS,
    CenterCropTransform,
    Distortion,
    IoUCrop,
    RandomDistortion,
    RandomExpand,
    SquareResize,
    build_augmentations,
    iou_of,
)
from iou_d2.data.mapper import CheckedDatasetMapper, boxes_of
from iou_d2.errors import InputError

ALL = '["distort", "expand", "iou_crop", "square", "flip"]'


@pytest.fixture(autouse=True)
def seed():
    np.random.seed(0)


def noise(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.randint(0, 256, (height, width, 3), dtype=np.uint8)


def iou_by_hand(a, b) -> float:
    common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


@pytest.mark.parametrize("is_bgr", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_colours_change_as_colorsys_says(is_bgr, first):
    change = Distortion(10.0, 0.8, first, 1.3, 24.0, is_bgr)
    image = noise(4, 5)
    found = change(image)
    for pixel, new in zip(image.reshape(-1, 3), found.reshape(-1, 3)):
        values = [min(max(float(v) + 10, 0), 255) for v in (pixel[::-1] if is_bgr else pixel)]
        if first:
            values = [0.8 * v for v in values]
        hue, saturation, value = colorsys.rgb_to_hsv(*(v / 255 for v in values))
        rgb = colorsys.hsv_to_rgb((hue + 24 / 360) % 1, min(1.3 * saturation, 1), value)
        values = [255 * v * (1 if first else 0.8) for v in rgb]
        expected = values[::-1] if is_bgr else values
        np.testing.assert_allclose(new, expected, atol=0.6)
    assert found.dtype == np.uint8


def test_nothing_is_distorted_by_default():
    image = noise()
    assert (Distortion()(image) == image).all()
    white = np.full((2, 2, 3), 250, dtype=np.uint8)
    assert (Distortion(brightness=32)(white) == 255).all()
    assert (Distortion(brightness=-300)(white) == 0).all()


def test_draws_are_those_of_caffe():
    drawn = [RandomDistortion().get_transform(noise(2, 2)).op for _ in range(800)]
    for name, default, low, high in [
        ("brightness", 0, -32, 32),
        ("contrast", 1, 0.5, 1.5),
        ("saturation", 1, 0.5, 1.5),
        ("hue", 0, -36, 36),
    ]:
        values = np.array([getattr(x, name) for x in drawn])
        changed = values[values != default]
        assert 0.44 < len(changed) / 800 < 0.56
        assert low <= changed.min() < low + 0.05 * (high - low)
        assert high >= changed.max() > high - 0.05 * (high - low)
    assert 0.44 < np.mean([x.contrast_first for x in drawn]) < 0.56


def test_the_canvas_has_the_mean_and_the_image_lies_in_it():
    expand, image, ratios = RandomExpand([10.4, 20.6, 300.0], 4.0), noise(), []
    for _ in range(300):
        transform = expand.get_transform(image)
        if isinstance(transform, T.NoOpTransform):
            continue
        new = transform.apply_image(image)
        box = transform.apply_box(np.array([[0, 0, 60, 40]]))[0].astype(int)
        x1, y1, x2, y2 = box
        assert (new[y1:y2, x1:x2] == image).all()
        outside = np.ones(new.shape[:2], dtype=bool)
        outside[y1:y2, x1:x2] = False
        assert (new[outside] == [10, 21, 255]).all()
        mask = transform.apply_segmentation(np.ones((40, 60), dtype=np.uint8))
        assert mask.shape == new.shape[:2] and mask.sum() == 40 * 60
        ratios.append(new.shape[0] / 40)
        assert abs(new.shape[1] / 60 - ratios[-1]) < 0.05
    assert 120 < len(ratios) < 180
    assert 1 <= min(ratios) < 1.1 and 3.9 < max(ratios) < 4


def test_crops_are_as_long_and_as_wide_as_published():
    """Every trial is found with a bound of 0."""
    for sizes in ((0.3, 1.0), (0.1, 1.0)):
        crops = np.array(
            [IoUCrop(sizes)._crop(np.array([[0, 0, 1, 1.0]]), 0.0) for _ in range(2000)]
        )
        sides = crops[:, 2:] - crops[:, :2]
        assert (crops >= 0).all() and (crops <= 1).all()
        scale, ratio = sides.prod(axis=1) ** 0.5, sides[:, 0] / sides[:, 1]
        assert sizes[0] <= scale.min() < sizes[0] + 0.02 and 0.98 < scale.max() <= 1
        assert CROP_RATIOS[0] - 1e-9 <= ratio.min() < 0.52
        assert 1.9 < ratio.max() <= CROP_RATIOS[1] + 1e-9
        # Corners are uniform in the room that is left.
        room = crops[:, :2] / np.maximum(1 - sides, 1e-9)
        np.testing.assert_allclose(room[scale < 0.9].mean(axis=0), 0.5, atol=0.03)


@pytest.mark.parametrize("bound", [iou for iou in CROP_IOUS if iou])
def test_a_crop_overlaps_an_object_as_much_as_its_bound_says(bound):
    boxes = np.array([[0.1, 0.1, 0.6, 0.7], [0.5, 0.2, 0.9, 0.9]])
    crops = [IoUCrop()._crop(boxes, bound) for _ in range(60)]
    found = [crop for crop in crops if crop is not None]
    assert found
    for crop in found:
        assert max(iou_by_hand(crop, box) for box in boxes) >= bound
    assert IoUCrop()._crop(np.array([[0.0, 0, 0.01, 0.01]]), bound) is None


def test_iou_of_is_that_by_hand():
    a = np.array([[0, 0, 4, 4.0], [1, 1, 3, 3], [2, 2, 2, 2]])
    b = np.array([[0, 0, 2, 2.0], [3, 3, 5, 5], [2, 2, 2, 2]])
    expected = [[iou_by_hand(x, y) for y in b[:2]] for x in a]
    np.testing.assert_allclose(iou_of(a, b)[:, :2], expected)
    assert iou_of(a, b)[:, 2].tolist() == [0, 0, 0]  # even with itself


def test_all_outcomes_of_the_crop_come_up_alike():
    """Objects as large as the image fit every bound: one of seven outcomes is the whole image."""
    boxes = np.array([[0.0, 0, 60, 40]])
    crop = IoUCrop((0.97, 1.0))
    whole = [isinstance(crop.get_transform(noise(), boxes), T.NoOpTransform) for _ in range(1400)]
    assert 1 / 7 - 0.03 < np.mean(whole) < 1 / 7 + 0.03


def test_an_object_stays_where_its_centre_is_in_the_crop():
    crop = CenterCropTransform(10, 5, 20, 10, 60, 40)
    boxes = np.array([[8, 0, 16, 14.0], [0, 0, 19, 20], [25, 0, 45, 20], [12, 6, 13, 7]])
    found = crop.apply_box(boxes)
    assert found.tolist() == [[0, 0, 6, 9], [0, 0, 0, 0], [0, 0, 0, 0], [2, 1, 3, 2]]
    assert crop.apply_box(np.zeros((0, 4))).shape == (0, 4)
    image = noise()
    assert (crop.apply_image(image) == image[5:15, 10:30]).all()


def test_without_boxes_nothing_is_cut():
    for boxes in (None, np.zeros((0, 4))):
        assert isinstance(IoUCrop().get_transform(noise(), boxes), T.NoOpTransform)


def test_squares_with_interpolations_by_chance(monkeypatch):
    resize = SquareResize(30, augmentation.INTERPOLATIONS)
    drawn = [resize.get_transform(noise()) for _ in range(200)]
    assert {x.interp for x in drawn} == set(augmentation.INTERPOLATIONS)
    assert drawn[0].apply_image(noise()).shape == (30, 30, 3)
    assert drawn[0].apply_box(np.array([[6, 4, 60, 40]])).tolist() == [[3, 3, 30, 30]]
    monkeypatch.setattr(np.random, "randint", None)
    assert SquareResize(30).get_transform(np.zeros((4, 4, 3))).interp == Image.BILINEAR


def cfg_of(names: str, *overrides: str):
    return get_config("", ["INPUT.AUGMENTATIONS", names, "INPUT.SQUARE_SIZE", "64", *overrides])


def test_names_become_augmentations_in_their_order():
    cfg = cfg_of('["flip", "expand", "shortest_edge"]', "INPUT.MIN_SIZE_TEST", "77")
    names = [type(x).__name__ for x in build_augmentations(cfg, is_train=True)]
    assert names == ["RandomFlip", "RandomExpand", "ResizeShortestEdge"]
    (test,) = build_augmentations(cfg, is_train=False)
    assert test.get_transform(noise()).new_h == 77
    cfg = cfg_of(ALL, "INPUT.RANDOM_FLIP", "none", "INPUT.FORMAT", "RGB")
    train = build_augmentations(cfg, is_train=True)
    assert isinstance(train[-1], T.NoOpTransform) and not train[0].is_bgr
    assert train[1].color.tolist() == [104, 116, 124]  # PIXEL_MEAN, rounded
    (test,) = build_augmentations(cfg, is_train=False)
    assert test.side == 64 and test.interpolations == (Image.BILINEAR,)


@pytest.mark.parametrize(
    ("names", "overrides", "sentence"),
    [
        ('["square", "mosaic"]', (), "takes names from distort, .*'mosaic'"),
        ('["flip"]', (), "has one of square and shortest_edge.*it is"),
        ('["square", "shortest_edge"]', (), "has one of square and shortest_edge"),
        (ALL, ("INPUT.CROP.ENABLED", "True"), "INPUT.CROP.ENABLED is True"),
        (ALL, ("INPUT.EXPAND_RATIO", "0.5"), "EXPAND_RATIO is at least 1"),
        (ALL, ("INPUT.IOU_CROP_SIZES", "[1.0, 0.3]"), "IOU_CROP_SIZES is two rising"),
        (ALL, ("INPUT.IOU_CROP_SIZES", "['a', 'b']"), "IOU_CROP_SIZES is two rising"),
        ('["square", ["flip"]]', (), r"takes names from distort, .*\['flip'\]"),
        (ALL, ("INPUT.SQUARE_SIZE", "0"), "SQUARE_SIZE is at least 1"),
    ],
)
def test_wrong_settings_are_named(names, overrides, sentence):
    with pytest.raises(InputError, match=sentence):
        build_augmentations(cfg_of(names, *overrides), is_train=True)


@pytest.fixture
def record(tmp_path):
    """Three objects, each of a grey of its own, and a crowd."""
    image = np.zeros((100, 150, 3), dtype=np.uint8)
    boxes = [[10, 10, 50, 40], [60, 20, 140, 90], [20, 60, 30, 75]]
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        image[y1:y2, x1:x2] = 100 + 50 * index
    Image.fromarray(image).save(tmp_path / "a.png")
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": index, "iscrowd": 0}
        for index, box in enumerate(boxes)
    ]
    crowd = {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 1}
    return {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 1,
        "width": 150,
        "height": 100,
        "annotations": [*annotations, crowd],
    }


def test_boxes_stay_on_their_objects(record):
    """Through expand, crop, square and flip: what is in a box has the grey of its class."""
    mapper = CheckedDatasetMapper(cfg_of('["expand", "iou_crop", "square", "flip"]'), True)
    seen = []
    for _ in range(60):
        mapped = mapper(record)
        assert mapped["image"].shape == (3, 64, 64)
        seen.append(len(mapped["instances"]))
        for box, index in zip(mapped["instances"].gt_boxes, mapped["instances"].gt_classes):
            x1, y1, x2, y2 = box.tolist()
            if x2 - x1 < 4 or y2 - y1 < 4:
                continue
            x, y = int((x1 + x2) / 2), int((y1 + y2) / 2)
            assert abs(int(mapped["image"][0, y, x]) - (100 + 50 * int(index))) <= 12
    assert min(seen) < 3 and max(seen) == 3
    assert boxes_of(record).tolist() == [[10, 10, 50, 40], [60, 20, 140, 90], [20, 60, 30, 75]]


def test_no_border_that_is_added_after_the_crop_is_in_a_box_or_mask(record):
    for item in record["annotations"][:3]:
        x1, y1, x2, y2 = item["bbox"]
        mask = np.zeros((100, 150), np.uint8, order="F")
        mask[y1:y2, x1:x2] = 1
        item["segmentation"] = mask_util.encode(mask)
    keys = ("INPUT.EXPAND_RATIO", "2.0", "MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT", "bitmask")
    mapper = CheckedDatasetMapper(cfg_of('["iou_crop", "expand", "square"]', *keys), True)
    looked_at = 0
    for _ in range(60):
        mapped = mapper(record)
        instances = mapped["instances"]
        for index, box in enumerate(instances.gt_boxes.tensor.round().int().tolist()):
            x1, y1, x2, y2 = box
            inner = mapped["image"][0, y1 + 4 : y2 - 4, x1 + 4 : x2 - 4].int()
            assert (inner - (100 + 50 * int(instances.gt_classes[index]))).abs().le(12).all()
            looked_at += inner.numel() > 0
            ys, xs = np.nonzero(instances.gt_masks.tensor[index].numpy())
            extent = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            np.testing.assert_allclose(extent, box, atol=3)
    assert looked_at > 50


def test_the_mapper_of_tests_resizes_alone(record):
    mapped = CheckedDatasetMapper(cfg_of(ALL), is_train=False)(record)
    assert mapped["image"].shape == (3, 64, 64) and "instances" not in mapped
    assert (mapped["height"], mapped["width"]) == (100, 150)


def test_an_image_without_objects_is_mapped(record):
    record["annotations"] = []
    for _ in range(10):
        assert len(CheckedDatasetMapper(cfg_of(ALL), is_train=True)(record)["instances"]) == 0


def test_nothing_changes_where_nothing_is_named(record):
    mapper = CheckedDatasetMapper(get_config("quick/retinanet_shapes"), is_train=True)
    names = [type(x).__name__ for x in mapper.augmentations.augs]
    assert names == ["ResizeShortestEdge", "RandomFlip"]
