"""The losses of box regression: smooth L1 and L2 on deltas, and the IoU family on boxes.

Shape letters: R boxes, P positive anchors or proposals. Boxes are XYXY in absolute pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torchvision.ops import (
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)

from .boxes import aligned_iou

IOU_KINDS = ("iou", "unitbox", "giou", "diou", "ciou")
KINDS = ("smooth_l1", "l2", *IOU_KINDS)

# -ln IoU grows no further below this IoU, where it is 13.8.
MIN_IOU = 1e-6
# A shorter side has no aspect ratio for CIoU, whose gradient grows with its inverse. In pixels.
MIN_RATIO_SIDE = 1e-3

# The corners `low` and `high` of inverted boxes, (R, 2) each -> those that count instead. It is
# taken side by side, where `high` is below `low`.
Inverted = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def collapsed(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """An inverted side has the length 0 and lies at its middle (ours): the box overlaps nothing."""
    middle = (low + high) / 2
    return middle, middle


def sorted_corners(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The corners are sorted, so that an inverted box is as good as the upright one of the same
    corners (arXiv 1902.09630, Algorithm 2, step 1)."""
    return high, low


INVERTED = {"collapsed": collapsed, "sorted": sorted_corners}


def box_iou_loss(
    boxes: Tensor, targets: Tensor, kind: str, inverted: Inverted = collapsed
) -> Tensor:
    """Loss of each box against its target, not reduced: the caller weights and sums.

    Half precision is computed in float32. By default an inverted box counts as the line or point at
    its centre. "giou", "diou" and "ciou" pull it to the target, as they do any box without overlap,
    "giou" only while it is outside of it; "iou" and "unitbox" have no gradient there. A target
    without area, which an inverted one is, gives no gradient to any. Gradients are small but for
    those of "unitbox", which grow with 1 / IoU.

    Args:
        boxes, targets: (R, 4) XYXY.
        kind: "iou" is 1 - IoU; "unitbox" -ln IoU (arXiv 1608.01471), with an IoU of at least
            `MIN_IOU`; "giou" arXiv 1902.09630; "diou" and "ciou" arXiv 1911.08287.
        inverted: what becomes of the inverted sides of `boxes`.

    Returns:
        (R,); (0,) for no boxes. NaN where an area is beyond float32, see `aligned_iou`.

    Raises:
        ValueError: another kind; the shapes differ or do not end in 4.
    """
    if boxes.shape != targets.shape or boxes.shape[-1] != 4:
        raise ValueError(
            f"box_iou_loss takes two tensors of boxes of one shape (R, 4), not "
            f"{tuple(boxes.shape)} and {tuple(targets.shape)}."
        )
    boxes, targets = _upright(boxes, inverted), _upright(targets, collapsed)
    # Of two boxes without area, the derivative of the IoU is infinite.
    has_area = (targets[..., 2:] > targets[..., :2]).all(dim=-1, keepdim=True)
    boxes = torch.where(has_area, boxes, boxes.detach())
    if kind == "iou":
        return 1 - aligned_iou(boxes, targets)
    if kind == "unitbox":
        iou = aligned_iou(boxes, targets)
        return -torch.where(iou < MIN_IOU, MIN_IOU, iou).log()  # `clamp` treats ties by version
    if kind == "giou":
        return generalized_box_iou_loss(boxes, targets)
    if kind == "diou":
        return distance_box_iou_loss(boxes, targets)
    if kind == "ciou":
        return _ciou_loss(boxes, targets)
    raise ValueError(f"The kind of an IoU loss is one of {', '.join(IOU_KINDS)}, not {kind!r}.")


class BoxDeltas:
    """Predicted deltas of P boxes, and the boxes that they make of their anchors or proposals."""

    def __init__(self, deltas: Tensor, anchors: Tensor, transform: Any):
        """
        Args:
            deltas: (P, 4). Half precision, which cannot hold boxes of more than 2048 px to the
                pixel, becomes float32.
            anchors: (P, 4) XYXY, from which the deltas lead to boxes.
            transform: Detectron2's Box2BoxTransform, or what has its `get_deltas` and
                `apply_deltas`.
        """
        self.deltas = _at_least_float32(deltas)
        self.anchors = anchors
        self.transform = transform

    @cached_property
    def boxes(self) -> Tensor:
        """(P, 4) XYXY, decoded once."""
        return self.transform.apply_deltas(self.deltas, self.anchors)

    def expected(self, targets: Tensor) -> Tensor:
        """The deltas (P, 4) that would lead to `targets` (P, 4) XYXY."""
        return self.transform.get_deltas(self.anchors, targets)


class BoxLoss(Protocol):
    """The loss of predicted boxes: a part that detectors are given, see `build_box_loss`."""

    def of_sides(self, boxes: Tensor, targets: Tensor, unit: Tensor | float = 1.0) -> Tensor:
        """Loss of each box whose sides are predicted as distances from a point, not reduced.

        The errors of the distances are those of the coordinates, since the point is the same.

        Args:
            boxes, targets: (R, 4) XYXY.
            unit: of the errors, in pixels: one for all or (R, 1). The IoU losses have none.

        Returns:
            (R,) in float32 at least; (0,) for no boxes.
        """

    def of_deltas(self, predicted: BoxDeltas, targets: Tensor) -> Tensor:
        """Sum over P boxes of the loss against `targets` (P, 4) XYXY, in float32 at least.

        A scalar; 0, with gradients, where P is 0.
        """


@dataclass(frozen=True)
class SmoothL1Loss:
    """Smooth L1 of distances or deltas, summed over the four; `beta` in their unit, 0 is L1."""

    beta: float

    def of_sides(self, boxes: Tensor, targets: Tensor, unit: Tensor | float = 1.0) -> Tensor:
        error = _side_errors(boxes, targets, unit)
        return smooth_l1_loss(error, torch.zeros_like(error), self.beta).sum(dim=-1)

    def of_deltas(self, predicted: BoxDeltas, targets: Tensor) -> Tensor:
        expected = predicted.expected(targets)
        return smooth_l1_loss(predicted.deltas, expected, self.beta, reduction="sum")


@dataclass(frozen=True)
class L2Loss:
    """The squared error of distances or deltas, summed over the four."""

    def of_sides(self, boxes: Tensor, targets: Tensor, unit: Tensor | float = 1.0) -> Tensor:
        return _side_errors(boxes, targets, unit).square().sum(dim=-1)

    def of_deltas(self, predicted: BoxDeltas, targets: Tensor) -> Tensor:
        return F.mse_loss(predicted.deltas, predicted.expected(targets), reduction="sum")


@dataclass(frozen=True)
class BoxIoULoss:
    """The loss of `IOU_KINDS` that `kind` names, of the boxes themselves: see `box_iou_loss`."""

    kind: str
    inverted: Inverted = collapsed

    def of_sides(self, boxes: Tensor, targets: Tensor, unit: Tensor | float = 1.0) -> Tensor:
        return box_iou_loss(boxes, targets, self.kind, self.inverted)

    def of_deltas(self, predicted: BoxDeltas, targets: Tensor) -> Tensor:
        return box_iou_loss(predicted.boxes, targets, self.kind, self.inverted).sum()


def build_box_loss(kind: str, beta: float, key: str, inverted: str = "collapsed") -> BoxLoss:
    """The loss that `kind` names, one of `KINDS`.

    Args:
        beta: of "smooth_l1".
        key: the config key of `kind`, which the ValueError for another kind names.
        inverted: MODEL.INVERTED_BOXES, one of `INVERTED`, of the IoU losses.
    """
    if kind not in KINDS:
        raise ValueError(f"{key} is one of {', '.join(KINDS)}, but it is {kind!r}.")
    if inverted not in INVERTED:
        raise ValueError(
            f"MODEL.INVERTED_BOXES is one of {', '.join(INVERTED)}, but it is {inverted!r}."
        )
    if kind == "smooth_l1":
        return SmoothL1Loss(beta)
    return L2Loss() if kind == "l2" else BoxIoULoss(kind, INVERTED[inverted])


def _side_errors(boxes: Tensor, targets: Tensor, unit: Tensor | float) -> Tensor:
    return (_at_least_float32(boxes) - _at_least_float32(targets)) / unit


def _ciou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """CIoU; DIoU where a box has no aspect ratio: at sides of 0 torchvision's CIoU is NaN."""
    sides = torch.cat([boxes[..., 2:] - boxes[..., :2], targets[..., 2:] - targets[..., :2]], -1)
    has_ratio = (sides > MIN_RATIO_SIDE).all(dim=-1)
    square = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=boxes.dtype, device=boxes.device)
    complete = complete_box_iou_loss(
        torch.where(has_ratio[..., None], boxes, square),
        torch.where(has_ratio[..., None], targets, square),
    )
    return torch.where(has_ratio, complete, distance_box_iou_loss(boxes, targets))


def _upright(boxes: Tensor, inverted: Inverted) -> Tensor:
    """In float32 at least, with what `inverted` makes of inverted sides. Other sides stay as they
    are to the last bit, and so do their gradients, also of those of length 0."""
    boxes = _at_least_float32(boxes)
    low, high = boxes[..., :2], boxes[..., 2:]
    new_low, new_high = inverted(low, high)
    wrong = high < low
    return torch.cat([torch.where(wrong, new_low, low), torch.where(wrong, new_high, high)], -1)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
