"""What training needs beside boxes is looked for before it starts, and told in one sentence."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from detectron2.data import MetadataCatalog

from coco_files import HEIGHT, WIDTH, annotation, two_images, write
from iou_d2 import get_config
from iou_d2.data.register import register_dataset
from iou_d2.engine.annotation_checks import check_key_points, check_masks, require_shapely
from iou_d2.errors import InputError
from voc_files import object_xml, write_image

SQUARE = [[4, 4, 24, 4, 24, 24, 4, 24]]
RLE = {"size": [HEIGHT, WIDTH], "counts": [100, 50, WIDTH * HEIGHT - 150]}
CROPS = [("INPUT.AUGMENTATIONS", '["iou_crop", "square"]'), ("INPUT.CROP.ENABLED", "True")]


def masked(*pairs: str):
    return get_config("quick/faster_rcnn_shapes", ["MODEL.MASK_ON", "True", *pairs])


def data_with(folder, *objects: dict) -> str:
    """A registered COCO file; of each object its segmentation and whether it is a crowd."""
    data = two_images()
    data["annotations"] = [
        annotation(31 + index, [4, 4, 20, 20], image_id=1 if index else 7, **fields)
        for index, fields in enumerate(objects)
    ]
    return register_dataset(f"coco:{write(folder, data)}", folder / "clean")


@pytest.fixture(params=[True, False])
def has_shapely(request, monkeypatch):
    module = ModuleType("shapely")
    module.__spec__ = ModuleSpec("shapely", None)
    monkeypatch.setitem(sys.modules, "shapely", module if request.param else None)
    return request.param


@pytest.mark.parametrize("segmentation", [None, [], [[1, 2, 3]]])
def test_the_first_object_without_a_mask_is_named(tmp_path, segmentation):
    good, crowd = {"segmentation": SQUARE}, {"iscrowd": 1}
    bad = {} if segmentation is None else {"segmentation": segmentation}
    name = data_with(tmp_path, good, crowd, bad, bad)
    with pytest.raises(
        InputError, match=r"annotation 33 of the image a\.png in coco:.*train\.json"
    ):
        check_masks(masked(), [name])
    check_masks(get_config("quick/faster_rcnn_shapes"), [name])


def test_every_training_set_needs_masks(tmp_path):
    (tmp_path / "coco").mkdir()
    good = data_with(tmp_path / "coco", {"segmentation": SQUARE}, {"iscrowd": 1})
    check_masks(masked(), [good])
    write_image(tmp_path / "voc", "a", object_xml("dog", 1, 1, 30, 20))
    boxes = register_dataset(f"voc:{tmp_path / 'voc'}", tmp_path / "clean")
    with pytest.raises(InputError, match=r"object 1 of the image .*a\.jpg in voc:.* has no segm"):
        check_masks(masked(), [good, boxes])


def test_rle_needs_the_format_bitmask(tmp_path):
    name = data_with(tmp_path, {"segmentation": SQUARE}, {"segmentation": RLE})
    with pytest.raises(InputError, match=r"annotation 32 of .* is RLE: set INPUT.MASK_FORMAT bitm"):
        check_masks(masked(), [name])
    check_masks(masked("INPUT.MASK_FORMAT", "bitmask"), [name])


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_polygons_are_cropped_with_shapely(tmp_path, has_shapely, crop, mask_format):
    cfg = masked("INPUT.MASK_FORMAT", mask_format, *crop)
    name = data_with(tmp_path, {"segmentation": SQUARE})
    if has_shapely:
        check_masks(cfg, [name])
        return
    for check in (require_shapely, lambda cfg: check_masks(cfg, [name])):
        with pytest.raises(InputError, match=f"{crop[0]}.*`pip install shapely`, or leave out"):
            check(cfg)


@pytest.mark.parametrize("crop", CROPS)
def test_rle_is_cropped_without_shapely(tmp_path, monkeypatch, crop):
    monkeypatch.setitem(sys.modules, "shapely", None)
    name = data_with(tmp_path, {"segmentation": RLE})
    check_masks(masked("INPUT.MASK_FORMAT", "bitmask", *crop), [name])
    require_shapely(get_config("quick/faster_rcnn_shapes", [*crop]))
    require_shapely(masked())


def test_key_points_need_names(tmp_path):
    name = data_with(tmp_path, {"keypoints": [5, 5, 2]})
    cfg = get_config("quick/faster_rcnn_shapes", ["MODEL.KEYPOINT_ON", "True"])
    cfg.DATASETS.TRAIN = (name,)
    with pytest.raises(InputError, match="MODEL.KEYPOINT_ON is True, but 'coco:.* does not name"):
        check_key_points(cfg)
    MetadataCatalog.get(name).set(keypoint_names=["nose"], keypoint_flip_map=[])
    check_key_points(cfg)
    cfg.DATASETS.TRAIN = ("keypoints_coco_2017_train",)
    check_key_points(cfg)
