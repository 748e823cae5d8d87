"""What a config wants of training data beside boxes, which they may not have: masks, key points."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from iou_d2.data.coco_records import NO_MASK, POLYGONS, RLE
from iou_d2.data.masks import first_by_mask
from iou_d2.errors import InputError


def check_masks(cfg: CfgNode, names: Sequence[str]) -> None:
    """Raise an InputError where MODEL.MASK_ON wants masks that an object of the training sets
    `names` does not have, or not in the form of INPUT.MASK_FORMAT, or that cannot be cropped."""
    if not cfg.MODEL.MASK_ON:
        return
    for name in names:
        first = first_by_mask(name)
        if NO_MASK in first:
            raise InputError(
                f"MODEL.MASK_ON is True, but {first[NO_MASK]} in {name} has no segmentation, only "
                "a box: give every object one, or set MODEL.MASK_ON False."
            )
        if RLE in first and cfg.INPUT.MASK_FORMAT == "polygon":
            raise InputError(
                f"INPUT.MASK_FORMAT is 'polygon', but the mask of {first[RLE]} in {name} is RLE: "
                "set INPUT.MASK_FORMAT bitmask, which takes both."
            )
        if POLYGONS in first:
            require_shapely(cfg)


def require_shapely(cfg: CfgNode) -> None:
    """Raise an InputError where polygons are to be cropped and shapely, which does it, is not
    installed."""
    crop = "INPUT.CROP.ENABLED is True" if cfg.INPUT.CROP.ENABLED else ""
    if "iou_crop" in cfg.INPUT.AUGMENTATIONS:
        crop = "INPUT.AUGMENTATIONS names iou_crop"
    if cfg.MODEL.MASK_ON and crop and importlib.util.find_spec("shapely") is None:
        raise InputError(
            f"{crop}, and MODEL.MASK_ON has the polygons of objects cropped with it, which needs "
            "shapely: run `pip install shapely`, or leave out the crop."
        )


def check_key_points(cfg: CfgNode) -> None:
    """Raise an InputError where MODEL.KEYPOINT_ON wants names of key points that a training set
    does not have."""
    if not cfg.MODEL.KEYPOINT_ON:
        return
    for name in cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(name)
        if metadata.get("keypoint_names") is None or metadata.get("keypoint_flip_map") is None:
            raise InputError(
                f"MODEL.KEYPOINT_ON is True, but '{name}' does not name its key points in "
                "Detectron2's metadata, as keypoints_coco_2017_train does: set MODEL.KEYPOINT_ON "
                "False."
            )
