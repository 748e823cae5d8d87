"""SSD300 and SSD512 on VGG-16, of mmdetection, torchvision, amdegroot/ssd.pytorch and lufficc/SSD.

Their boxes have one order and one meaning. The background is the first class but in mmdetection.
torchvision's COCO has the 91 ids of its annotations, with the background: 90 classes here, where
class k has the id k + 1. What boxes were trained with stands in the config: SETTINGS.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from iou_d2.errors import InputError

from .layouts import PixelFormat
from .network import Network
from .rows import Change, Row

LEVELS = range(7)  # of SSD512; SSD300 has one less
VGG = "backbone.vgg.features"

CAFFE_PIXELS = PixelFormat(mean=(123.0, 117.0, 104.0), std=(1.0, 1.0, 1.0))
PIXELS = {
    "amdegroot": CAFFE_PIXELS,
    "lufficc": CAFFE_PIXELS,
    "torchvision": PixelFormat(mean=(122.99925, 116.9991, 103.9992), std=(1.0, 1.0, 1.0)),
    "mmdet": PixelFormat(std=(1.0, 1.0, 1.0)),
}

_CENTERS_AND_SIDES = {"MODEL.SSD.CLIP": "centers_and_sides", "MODEL.SSD.TRUNCATE_SIZES": False}
SETTINGS = {
    "mmdet": {"MODEL.SSD.CLIP": "none", "MODEL.SSD.TRUNCATE_SIZES": True},
    "torchvision": {"MODEL.SSD.CLIP": "sides", "MODEL.SSD.TRUNCATE_SIZES": False},
    "amdegroot": _CENTERS_AND_SIDES,
    "lufficc": _CENTERS_AND_SIDES,
}


def mmdet_rows() -> list[Row]:
    rows = [
        *vgg_rows("backbone.features"),
        Row("neck.l2_norm.weight", "backbone.norms.conv4_3.weight"),
        Row("backbone.l2_norm.weight", "backbone.norms.conv4_3.weight"),  # before 2.14
    ]
    for stage in range(5):
        for conv in (0, 1):
            ours = f"backbone.extra.conv{stage + 6}_2.{2 * conv}.*"
            rows.append(Row(f"neck.extra_layers.{stage}.{conv}.conv.*", ours))
            rows.append(Row(f"backbone.extra.{2 * stage + conv}.*", ours))
    for theirs, ours in (("reg_convs", "bbox_pred"), ("cls_convs", "cls_score")):
        rows.append(Row(f"bbox_head.{theirs}.#.0.*", f"head.{ours}.#.*"))
        rows.append(Row(f"bbox_head.{theirs}.#.*", f"head.{ours}.#.*"))
    return rows


def torchvision_rows() -> list[Row]:
    # conv5 and what follows are one block, in which the layers have numbers of their own.
    conv5 = [Row(f"backbone.extra.0.{x}.*", f"{VGG}.{23 + x}.*") for x in (1, 3, 5)]
    extra = [
        Row(f"backbone.extra.{stage}.#.*", f"backbone.extra.conv{stage + 5}_2.#.*")
        for stage in range(1, 6)
    ]
    return [
        Row("backbone.extra.0.7.1.*", "backbone.fc6.*"),
        Row("backbone.extra.0.7.3.*", "backbone.fc7.*"),
        *conv5,
        *extra,
        Row("backbone.features.#.*", f"{VGG}.#.*"),
        Row("backbone.scale_weight", "backbone.norms.conv4_3.weight"),
        *head_rows("head.regression_head.module_list", "head.classification_head.module_list"),
    ]


def amdegroot_rows() -> list[Row]:
    return [
        *vgg_rows("vgg"),
        *extra_rows("extras"),
        Row("L2Norm.weight", "backbone.norms.conv4_3.weight"),
        *head_rows("loc", "conf"),
    ]


def lufficc_rows() -> list[Row]:
    head = "box_head.predictor"
    return [
        *vgg_rows("backbone.vgg"),
        *extra_rows("backbone.extras"),
        Row("backbone.l2_norm.weight", "backbone.norms.conv4_3.weight"),
        *head_rows(f"{head}.reg_headers", f"{head}.cls_headers"),
    ]


def vgg_rows(prefix: str) -> list[Row]:
    """VGG-16 whose fc6 and fc7 follow its convolutions under numbers of their own."""
    return [
        Row(f"{prefix}.31.*", "backbone.fc6.*"),
        Row(f"{prefix}.33.*", "backbone.fc7.*"),
        Row(f"{prefix}.#.*", f"{VGG}.#.*"),
    ]


def extra_rows(prefix: str) -> list[Row]:
    return [
        Row(f"{prefix}.{2 * stage + conv}.*", f"backbone.extra.conv{stage + 6}_2.{2 * conv}.*")
        for stage in range(5)
        for conv in (0, 1)
    ]


def head_rows(
    boxes: str,
    classes: str,
    our_boxes: str = "head.bbox_pred",
    our_classes: str = "head.cls_score",
) -> list[Row]:
    """The convolutions of each level; `classes` have the background first."""
    rows = [Row(f"{boxes}.#.*", f"{our_boxes}.#.*")]
    for level in LEVELS:
        change = _background_moves(f"{boxes}.{level}.weight", f"{our_boxes}.{level}.weight")
        rows.append(Row(f"{classes}.{level}.*", f"{our_classes}.{level}.*", change))
    return rows


def _background_moves(their_boxes: str, our_boxes: str) -> Change:
    """The names are of the box convolution of the same level, which tells how many boxes a cell
    has."""

    def to_ours(tensor: Tensor, all_tensors: Mapping[str, Tensor]) -> Tensor:
        return _by_box(tensor, their_boxes, all_tensors).roll(-1, dims=1).flatten(0, 1)

    def to_theirs(tensor: Tensor, all_tensors: Mapping[str, Tensor]) -> Tensor:
        return _by_box(tensor, our_boxes, all_tensors).roll(1, dims=1).flatten(0, 1)

    told = "the background class is the last one in Detectron2 and the first one elsewhere"
    return Change(to_ours, to_theirs, told)


def _by_box(scores: Tensor, boxes: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Scores (AC, ...) of a cell -> (A, C, ...), as many as the box deltas `boxes` (4A, ...)."""
    if boxes not in tensors:
        raise InputError(
            f"The classes of SSD cannot be put into order without {boxes}, which tells how many "
            "boxes a cell has: is the file whole?"
        )
    shape = tuple(tensors[boxes].shape)
    count = shape[0] // 4 if shape else 0
    if not count or not scores.dim() or len(scores) % count:
        raise InputError(
            f"{boxes} is of shape {shape}, four rows for each box of a cell, but the scores beside "
            f"it are of shape {tuple(scores.shape)}, not as many rows for each box."
        )
    return scores.reshape(count, -1, *scores.shape[1:])


SSD = Network(
    title="SSD",
    signs={
        "mmdet": r"^(neck|backbone)\.l2_norm\.",
        "torchvision": r"^backbone\.scale_weight$",
        "amdegroot": r"^L2Norm\.weight$",
        "lufficc": r"^box_head\.predictor\.reg_headers\.",
        "detectron2": r"^backbone\.extra\.conv7_2\.",
    },
    rows={
        "mmdet": mmdet_rows,
        "torchvision": torchvision_rows,
        "amdegroot": amdegroot_rows,
        "lufficc": lufficc_rows,
    },
    pixels=PIXELS,
    settings=SETTINGS,
)
