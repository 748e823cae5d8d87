"""RetinaNet of mmdetection and torchvision, and the IoU-aware RetinaNet, whose authors' code is an
mmdetection.

In a cell, anchors go by size first in Detectron2 and by ratio first elsewhere, and so do the
channels of the convolutions that say something of each anchor.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from iou_d2.errors import InputError

from .network import Network
from .rows import Change, Row

_MOST_LAYERS = 16  # of a tower, which Detectron2 counts with its norms and activations
# Where the layouts keep the convolution with four channels an anchor.
_BOX_CONVS = (
    "head.bbox_pred.weight",
    "bbox_head.retina_reg.weight",
    "head.regression_head.bbox_reg.weight",
)
# Anchors a cell -> how many ratios of how many sizes they are, in all published models; the order
# of one size or one ratio is the same.
_RATIOS_AND_SIZES = {1: (1, 1), 2: (1, 2), 3: (1, 3), 5: (1, 5), 7: (1, 7), 9: (3, 3)}


def _ratios_and_sizes(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    name = next((name for name in _BOX_CONVS if name in tensors), None)
    if name is None:
        raise InputError(
            "The order of anchors cannot be changed, for there is no convolution of their boxes: "
            f"none of {', '.join(_BOX_CONVS)}."
        )
    shape = tuple(tensors[name].shape)
    anchors = shape[0] // 4 if shape else 0
    if anchors not in _RATIOS_AND_SIZES:
        raise InputError(
            f"{name} is for {anchors} anchors a cell, by its shape {shape}. Their order cannot be "
            "changed, for it is not known how many sizes and ratios they have; 9 are 3 of both."
        )
    return _RATIOS_AND_SIZES[anchors]


def _regroup(x: Tensor, outer: int, inner: int) -> Tensor:
    """Channels of outer * inner anchors, as many for each, -> with inner before outer."""
    if len(x) % (outer * inner):
        raise InputError(
            f"{len(x)} channels of a convolution are not as many for each of {outer * inner} "
            f"anchors."
        )
    return x.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def _sizes_first(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    ratios, sizes = _ratios_and_sizes(tensors)
    return _regroup(x, ratios, sizes)


def _ratios_first(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    ratios, sizes = _ratios_and_sizes(tensors)
    return _regroup(x, sizes, ratios)


def _anchors_of(library: str, configs: str) -> Change:
    return Change(
        _sizes_first,
        _ratios_first,
        f"the anchors of a cell go by size first in Detectron2 and by ratio first in {library}, 3 "
        f"of each; what else {library} does unlike Detectron2 is in the configs {configs}",
    )


MMDET_ANCHORS = _anchors_of("mmdetection", "mmdet/retinanet_* and mmdet/iou_retinanet_*")
TORCHVISION_ANCHORS = _anchors_of("torchvision", "torchvision/retinanet_*")


def mmdet_rows() -> list[Row]:
    rows = [
        Row("bbox_head.retina_cls.*", "head.cls_score.*", MMDET_ANCHORS),
        Row("bbox_head.retina_reg.*", "head.bbox_pred.*", MMDET_ANCHORS),
        Row("bbox_head.retina_iou.*", "head.iou_pred.*", MMDET_ANCHORS),
    ]
    for layer in range(_MOST_LAYERS):
        rows += [
            Row(f"bbox_head.cls_convs.{layer}.conv.*", f"head.cls_subnet.{2 * layer}.*"),
            Row(f"bbox_head.reg_convs.{layer}.conv.*", f"head.bbox_subnet.{2 * layer}.*"),
        ]
    return rows


def torchvision_rows() -> list[Row]:
    """Of `retinanet_resnet50_fpn`, whose published file has names of torchvision before 0.13."""
    rows = _torchvision_predictors()
    for theirs, ours in _TORCHVISION_TOWERS:
        for layer in range(_MOST_LAYERS):
            rows.append(Row(f"{theirs}.{layer}.0.*", f"{ours}.{2 * layer}.*"))
        rows.append(Row(f"{theirs}.#.*", f"{ours}.#.*"))
    return rows


def torchvision_norm_rows() -> list[Row]:
    """Of `retinanet_resnet50_fpn_v2`, whose towers have norms."""
    rows = _torchvision_predictors()
    for theirs, ours in _TORCHVISION_TOWERS:
        for layer in range(_MOST_LAYERS):
            rows += [
                Row(f"{theirs}.{layer}.0.*", f"{ours}.{3 * layer}.*"),
                Row(f"{theirs}.{layer}.1.*", f"{ours}.{3 * layer + 1}.*"),
            ]
    return rows


_TORCHVISION_TOWERS = (
    ("head.classification_head.conv", "head.cls_subnet"),
    ("head.regression_head.conv", "head.bbox_subnet"),
)


def _torchvision_predictors() -> list[Row]:
    return [
        Row("head.classification_head.cls_logits.*", "head.cls_score.*", TORCHVISION_ANCHORS),
        Row("head.regression_head.bbox_reg.*", "head.bbox_pred.*", TORCHVISION_ANCHORS),
    ]


# The third module of a tower is a convolution here and a ReLU where there are norms. The FCOS of
# torchvision has norms, but not one module a layer.
RETINANET = Network(
    title="RetinaNet",
    signs={
        "mmdet": r"^bbox_head\.retina_(cls|reg)\.",
        "torchvision": r"^head\.classification_head\.conv\.(2\.weight|0\.0\.bias)$",
        "detectron2": r"^head\.cls_subnet\.2\.",
    },
    rows={"mmdet": mmdet_rows, "torchvision": torchvision_rows},
)
RETINANET_WITH_NORM = Network(
    title="RetinaNet with norms in its head",
    signs={
        "torchvision": r"^head\.classification_head\.conv\.0\.1\.",
        "detectron2": r"^head\.cls_subnet\.1\.",
    },
    rows={"torchvision": torchvision_norm_rows},
)
