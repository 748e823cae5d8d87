"""What makes a dense detector IoU-aware (arXiv 1912.05992): a predicted IoU that learns how well a
box fits, and a confidence that counts it.

Shape letters: R anchors of a level, K classes, P positive anchors of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from iou_d2.errors import InputError
from iou_d2.ops.box_losses import BoxDeltas
from iou_d2.ops.boxes import aligned_iou
from iou_d2.ops.calibration import Calibration, as_predicted

from .calibration import build_calibration
from .dense import part_named


def confidence(probability: Tensor, iou: Tensor, alpha: float) -> Tensor:
    """p^alpha * IoU^(1 - alpha), elementwise. alpha = 1 returns p to the last bit."""
    return probability.pow(alpha) * iou.pow(1 - alpha)


# (iou_logits, target), both (P,), -> the sum over positive anchors of the loss between predicted
# and true IoU; 0, with gradients, where P is 0.
IoULoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(iou_logits: Tensor, target: Tensor) -> Tensor:
    """Its gradient in the target is log((1 - p) / p) (Eqn. 5)."""
    return F.binary_cross_entropy_with_logits(iou_logits, target, reduction="sum")


def l1_after_sigmoid(iou_logits: Tensor, target: Tensor) -> Tensor:
    return (iou_logits.sigmoid() - target).abs().sum()


def l2_after_sigmoid(iou_logits: Tensor, target: Tensor) -> Tensor:
    return (iou_logits.sigmoid() - target).square().sum()


IOU_LOSSES: dict[str, IoULoss] = {
    "bce": cross_entropy,
    "l1": l1_after_sigmoid,
    "l2": l2_after_sigmoid,
}


@dataclass(frozen=True)
class IoUAwareness:
    """What the predicted IoU of an anchor learns, and what it does to the confidence.

    Args:
        alpha: weight of the class score in the confidence, in [0, 1].
        loss_of, loss_weight: one of IOU_LOSSES; factor of it.
        target_gradient: let the gradient of the target reach the deltas.
        calibration: what a predicted IoU counts for in detections.
    """

    alpha: float = 0.5
    loss_of: IoULoss = cross_entropy
    loss_weight: float = 1.0
    target_gradient: bool = True
    calibration: Calibration = as_predicted

    def loss(self, iou_logits: Tensor, predicted: BoxDeltas, gt_boxes: Tensor) -> Tensor:
        """The sum over P positive anchors, of logits (P,), their boxes and ground truth (P, 4)."""
        target = aligned_iou(predicted.boxes, gt_boxes)
        if not self.target_gradient:
            target = target.detach()
        return self.loss_weight * self.loss_of(iou_logits.float(), target)

    def rank(self, probability: Tensor, iou_logits: Tensor) -> dict[str, Tensor]:
        """Class scores p (R, K) and logits (R, 1) -> {"scores": p^alpha * IoU^(1 - alpha),
        "cls_scores": p, "pred_ious": IoU}, each (R, K)."""
        iou = self.calibration(iou_logits.float().sigmoid())
        return {
            "scores": confidence(probability, iou, self.alpha),
            "cls_scores": probability,
            "pred_ious": iou.expand_as(probability),
        }


def build_iou_awareness(cfg) -> IoUAwareness:
    """What MODEL.IOU_RETINANET says, for RetinaNet and for SSD."""
    node, key = cfg.MODEL.IOU_RETINANET, "MODEL.IOU_RETINANET"
    if not 0 <= node.ALPHA <= 1:
        raise InputError(f"{key}.ALPHA lies in [0, 1], but it is {node.ALPHA}.")
    return IoUAwareness(
        alpha=node.ALPHA,
        loss_of=part_named(IOU_LOSSES, node.IOU_LOSS_TYPE, f"{key}.IOU_LOSS_TYPE"),
        loss_weight=node.IOU_LOSS_WEIGHT,
        target_gradient=node.IOU_TARGET_GRADIENT,
        calibration=build_calibration(cfg),
    )
