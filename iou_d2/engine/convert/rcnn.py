"""Faster, Mask and Cascade R-CNN with FPN.

K classes. mmdetection and Detectron2 keep the background last, at K; torchvision keeps it first and
gives it boxes and a mask of its own, which nothing reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from iou_d2.errors import InputError

from .network import Network
from .resnet import conv_module
from .rows import Change, Row

_BOX, _MASK, _RPN = "roi_heads.box_", "roi_heads.mask_head", "proposal_generator.rpn_head"
_CLASSES = f"{_BOX}predictor.cls_score.weight"
_MOST_LAYERS = 8  # of a kind that a table counts from 0 on one side and from 1 on the other


def mmdet_rows() -> list[Row]:
    """Of mmdetection 2 and 3. A Cascade R-CNN has a number, "#", for each stage."""
    rows = [
        Row("rpn_head.rpn_conv.*", f"{_RPN}.conv.*"),
        Row("rpn_head.rpn_conv.#.conv.*", f"{_RPN}.conv.conv#.*"),
        Row("rpn_head.rpn_cls.*", f"{_RPN}.objectness_logits.*"),
        Row("rpn_head.rpn_reg.*", f"{_RPN}.anchor_deltas.*"),
    ]
    for stage in ("", ".#"):
        theirs, ours = f"roi_head.bbox_head{stage}", f"{_BOX}head{stage}"
        predictor = f"{_BOX}predictor{stage}"
        rows += mmdet_box_head_rows(theirs, ours)
        told = CASCADE if stage else None
        rows += [
            Row(f"{theirs}.fc_cls.*", f"{predictor}.cls_score.*", told),
            Row(f"{theirs}.fc_reg.*", f"{predictor}.bbox_pred.*"),
        ]
        theirs = f"roi_head.mask_head{stage}"
        rows += _mmdet_mask_rows(theirs, f"{_MASK}.stages.#" if stage else _MASK)
    return rows


def mmdet_box_head_rows(theirs: str, ours: str) -> list[Row]:
    rows = []
    for index in range(_MOST_LAYERS):
        rows.append(Row(f"{theirs}.shared_fcs.{index}.*", f"{ours}.fc{index + 1}.*"))
        rows += conv_module(f"{theirs}.shared_convs.{index}", f"{ours}.conv{index + 1}")
    return rows


def _mmdet_mask_rows(theirs: str, ours: str) -> list[Row]:
    rows = [
        Row(f"{theirs}.upsample.*", f"{ours}.deconv.*"),
        Row(f"{theirs}.conv_logits.*", f"{ours}.predictor.*"),
    ]
    for index in range(_MOST_LAYERS):
        rows += conv_module(f"{theirs}.convs.{index}", f"{ours}.mask_fcn{index + 1}")
    return rows


def torchvision_rows() -> list[Row]:
    """Of `fasterrcnn_resnet50_fpn` and `maskrcnn_resnet50_fpn`; the published files have the names
    without ".0.0" of torchvision before 0.13."""
    return [
        Row("rpn.head.conv.0.0.*", f"{_RPN}.conv.*"),
        Row("rpn.head.conv.*", f"{_RPN}.conv.*"),
        Row("roi_heads.box_head.fc6.*", f"{_BOX}head.fc1.*"),
        Row("roi_heads.box_head.fc7.*", f"{_BOX}head.fc2.*"),
        *_torchvision_shared_rows(),
    ]


def torchvision_v2_rows() -> list[Row]:
    """Of `fasterrcnn_resnet50_fpn_v2` and `maskrcnn_resnet50_fpn_v2`."""
    rows = [Row("rpn.head.conv.#.0.*", f"{_RPN}.conv.conv#.*")]
    for index in range(4):
        theirs, ours = f"roi_heads.box_head.{index}", f"{_BOX}head.conv{index + 1}"
        rows += [Row(f"{theirs}.0.*", f"{ours}.*"), Row(f"{theirs}.1.*", f"{ours}.norm.*")]
    # 4 is what flattens.
    return [*rows, Row("roi_heads.box_head.5.*", f"{_BOX}head.fc1.*"), *_torchvision_shared_rows()]


def _torchvision_shared_rows() -> list[Row]:
    rows = [
        Row("rpn.head.cls_logits.*", f"{_RPN}.objectness_logits.*"),
        Row("rpn.head.bbox_pred.*", f"{_RPN}.anchor_deltas.*"),
        Row("roi_heads.box_predictor.cls_score.*", f"{_BOX}predictor.cls_score.*", BACKGROUND),
        Row("roi_heads.box_predictor.bbox_pred.*", f"{_BOX}predictor.bbox_pred.*", BOXES),
        Row("roi_heads.mask_predictor.conv5_mask.*", f"{_MASK}.deconv.*"),
        Row("roi_heads.mask_predictor.mask_fcn_logits.*", f"{_MASK}.predictor.*", MASKS),
    ]
    for index in range(_MOST_LAYERS):
        ours = f"{_MASK}.mask_fcn{index + 1}"
        rows += [
            Row(f"roi_heads.mask_head.{index}.0.*", f"{ours}.*"),
            Row(f"roi_heads.mask_head.{index}.1.*", f"{ours}.norm.*"),
            Row(f"roi_heads.mask_head.mask_fcn{index + 1}.*", f"{ours}.*"),
        ]
    return rows


def _background_last(x: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    return x.roll(-1, dims=0)


def _background_first(x: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    return x.roll(1, dims=0)


def _without_background_box(x: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    return x[4:]


def _with_background_box(x: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    _check_rows(x, 4, "bbox_pred", others)
    return torch.cat([x.new_zeros(4, *x.shape[1:]), x])


def _without_background_mask(x: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    return x[1:]


def _with_background_mask(x: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    _check_rows(x, 1, "the mask predictor", others)
    return torch.cat([x.new_zeros(1, *x.shape[1:]), x])


def _check_rows(x: Tensor, rows: int, layer: str, others: Mapping[str, Tensor]) -> None:
    """Torchvision has no class-agnostic boxes and masks."""
    wanted = rows * (others[_CLASSES].shape[0] - 1) if _CLASSES in others else len(x)
    if len(x) != wanted:
        raise InputError(
            f"{layer} has {len(x)} rows and not {wanted}, {rows} for each class as in torchvision."
        )


def as_it_is(x: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    return x


CASCADE = Change(
    as_it_is,
    as_it_is,
    "no number, but mmdetection averages the stages of a cascade, and measures the boxes of the "
    "last one, unlike Detectron2: that is in the configs mmdet/cascade_*",
)
BACKGROUND = Change(
    _background_last,
    _background_first,
    "the background is the last class of Detectron2 and the first of torchvision; what else "
    "torchvision does unlike Detectron2 is in the configs torchvision/faster_rcnn_* and "
    "torchvision/mask_rcnn_*",
)
BOXES = Change(
    _without_background_box,
    _with_background_box,
    "torchvision has a box for the background, which it does not read: left out, or zeros",
)
MASKS = Change(
    _without_background_mask,
    _with_background_mask,
    "torchvision has a mask for the background, which it does not read: left out, or zeros",
)

# Before RCNN, whose names it has too: two convolutions in the RPN, four in the box head.
RCNN_V2 = Network(
    title="R-CNN, version 2 of torchvision",
    signs={
        "torchvision": r"^rpn\.head\.conv\.1\.0\.",
        "detectron2": r"^proposal_generator\.rpn_head\.conv\.conv1\.",
    },
    rows={"torchvision": torchvision_v2_rows, "mmdet": mmdet_rows},
)
RCNN = Network(
    title="R-CNN",
    signs={
        "mmdet": r"^roi_head\.bbox_head\.(\d+\.)?fc_cls\.",
        "torchvision": r"^roi_heads\.box_predictor\.cls_score\.",
        "detectron2": r"^roi_heads\.box_predictor\.(\d+\.)?cls_score\.",
    },
    rows={"mmdet": mmdet_rows, "torchvision": torchvision_rows},
)
