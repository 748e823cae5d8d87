"""Parts of RetinaNet in which Detectron2, torchvision and mmdetection differ: which anchors learn
what, what losses are divided by, what goes to NMS, and whether a norm follows a bias.

Config keys choose them by name. Shape letters are those of retinanet.py, and M objects of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from iou_d2.errors import InputError
from iou_d2.layers.over_maps import over_maps

# IoUs (M, R) of objects and anchors -> the object of each anchor (R,), and (R,) 1 for positive, 0
# for background, -1 for neither.
AnchorMatcher = Callable[[Tensor], tuple[Tensor, Tensor]]


class LastObjectMatcher:
    """mmdetection's MaxIoUAssigner: an anchor that fits an object best of all anchors learns that
    object, the last one where it does so for several.

    In Detectron2's Matcher with `allow_low_quality_matches` it learns the object that it overlaps
    most.
    """

    def __init__(self, negative: float, positive: float):
        """
        Args:
            negative: anchors with a lower IoU with all objects are background.
            positive: those with at least this IoU learn the object that they overlap most. Those
                between the two learn nothing.
        """
        self.negative = negative
        self.positive = positive

    def __call__(self, ious: Tensor) -> tuple[Tensor, Tensor]:
        """As AnchorMatcher; all are background where there is no object."""
        if ious.numel() == 0:
            nothing = ious.new_zeros(ious.shape[1], dtype=torch.int64)
            return nothing, nothing.to(torch.int8)
        highest, matches = ious.max(dim=0)
        labels = torch.full_like(matches, -1, dtype=torch.int8)
        labels[highest < self.negative] = 0
        labels[highest >= self.positive] = 1
        is_best = ious == ious.max(dim=1, keepdim=True).values  # also of anchors that tie
        objects, anchors = is_best.nonzero(as_tuple=True)
        last = torch.full_like(matches, -1).scatter_reduce(0, anchors, objects, "amax")
        labels[anchors] = 1
        return torch.where(last >= 0, last, matches), labels


def _detectron2_assigner(node) -> dict[str, Any]:
    matcher = Matcher(node.IOU_THRESHOLDS, node.IOU_LABELS, allow_low_quality_matches=True)
    return {"anchor_matcher": matcher, "padding_is_background": True}


def _mmdet_assigner(node) -> dict[str, Any]:
    if list(node.IOU_LABELS) != [0, -1, 1]:
        raise InputError(
            f"MODEL.RETINANET.IOU_LABELS is [0, -1, 1] where MODEL.RETINANET.ASSIGNER is 'mmdet', "
            f"but it is {node.IOU_LABELS}."
        )
    return {
        "anchor_matcher": LastObjectMatcher(*node.IOU_THRESHOLDS),
        "padding_is_background": False,
    }


# MODEL.RETINANET -> arguments of BoxLossRetinaNet.
ASSIGNERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "detectron2": _detectron2_assigner,
    "mmdet": _mmdet_assigner,
}


class Share(NamedTuple):
    """Images whose losses are summed and divided by one number."""

    images: slice
    divisor: float


ALL = slice(None)

# (number of positive anchors of each of N images, the running mean of that of a batch) -> the
# shares whose sum is the loss of the batch.
Normalizer = Callable[[list[int], float], list[Share]]


def by_running_mean(counts: list[int], mean: float) -> list[Share]:
    """Detectron2."""
    return [Share(ALL, mean)]


def by_batch(counts: list[int], mean: float) -> list[Share]:
    """mmdetection: the positive anchors of the batch, where an image without any counts as 1."""
    return [Share(ALL, sum(max(count, 1) for count in counts))]


def by_image(counts: list[int], mean: float) -> list[Share]:
    """torchvision: the positive anchors of an image, at least 1, and the mean over images."""
    divisors = [max(count, 1) * len(counts) for count in counts]
    return [Share(slice(i, i + 1), divisor) for i, divisor in enumerate(divisors)]


NORMALIZERS: dict[str, Normalizer] = {
    "running_mean": by_running_mean,
    "batch": by_batch,
    "image": by_image,
}


# The candidates of a level -> those that go to NMS.
BeforeNMS = Callable[[Instances], Instances]


def as_predicted(candidates: Instances) -> Instances:
    """Detectron2."""
    return candidates


def clipped(candidates: Instances) -> Instances:
    """torchvision: boxes end at the border of the image, also those of which nothing is left."""
    boxes = clip_boxes_to_image(candidates.pred_boxes.tensor, candidates.image_size)
    candidates.pred_boxes = Boxes(boxes)
    return candidates


def clipped_with_area(candidates: Instances) -> Instances:
    """mmdetection: boxes end at the border, and have an area."""
    candidates = clipped(candidates)
    return candidates[candidates.pred_boxes.nonempty()]


BEFORE_NMS: dict[str, BeforeNMS] = {
    "as_predicted": as_predicted,
    "clipped": clipped,
    "clipped_with_area": clipped_with_area,
}


class AllLevelsHead(RetinaNetHead):
    """Detectron2's RetinaNetHead, each of whose layers takes all levels at once."""

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], ...]:
        """L features (N, C, H, W) -> L class logits (N, AK, H, W) and L deltas (N, 4A, H, W)."""
        logits = over_maps(self.cls_score, over_maps(self.cls_subnet, features))
        return logits, over_maps(self.bbox_pred, over_maps(self.bbox_subnet, features))


def build_head(kind: type[RetinaNetHead], cfg, shapes) -> RetinaNetHead:
    """The head for features of `shapes`, without needless biases where the config says so."""
    head = kind(cfg, shapes)
    if not cfg.MODEL.RETINANET.BIAS_BEFORE_NORM:
        drop_bias_before_norm(head)
    return head


def drop_bias_before_norm(head: RetinaNetHead) -> None:
    """Take their bias from the convolutions of the towers that a norm follows, as in torchvision
    and mmdetection."""
    for tower in (x for x in head.children() if isinstance(x, nn.Sequential)):
        for layer, following in zip(tower, tower[1:]):
            if isinstance(layer, nn.Conv2d) and not isinstance(following, nn.ReLU):
                layer.bias = None
