"""IoU-aware RetinaNet (Wu et al., arXiv 1912.05992).

One more 3x3 conv beside the box regression predicts for every anchor the IoU of its decoded box
with the ground truth. Detections are ranked by p^alpha * IoU^(1 - alpha).

Shape letters and words are those of retinanet.py; `iou_logits` are predicted IoUs before the
sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from iou_d2.errors import InputError
from iou_d2.ops.boxes import aligned_iou

from .dense import part_named, reduce_mean
from .retinanet import AnchorPrediction, BoxLossRetinaNet, Positives
from .retinanet_parts import Share, build_head


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


class IoUAwareRetinaNetHead(RetinaNetHead):
    """RetinaNetHead and the IoU conv, `iou_pred`, on the last feature of the box tower."""

    @configurable
    def __init__(self, *, num_anchors: int, conv_dims: list[int], **kwargs):
        super().__init__(num_anchors=num_anchors, conv_dims=conv_dims, **kwargs)
        self.iou_pred = nn.Conv2d(conv_dims[-1], num_anchors, kernel_size=3, padding=1)
        nn.init.normal_(self.iou_pred.weight, std=0.01)
        nn.init.zeros_(self.iou_pred.bias)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """L features (N, C, H, W) -> L class logits (N, AK, H, W), L deltas (N, 4A, H, W) and
        L IoU logits (N, A, H, W)."""
        logits, deltas, iou_logits = [], [], []
        for feature in features:
            box_feature = self.bbox_subnet(feature)
            logits.append(self.cls_score(self.cls_subnet(feature)))
            deltas.append(self.bbox_pred(box_feature))
            iou_logits.append(self.iou_pred(box_feature))
        return logits, deltas, iou_logits


def iou_aware_arguments(cfg) -> dict[str, Any]:
    """What MODEL.IOU_RETINANET says, as IoUAwareRetinaNet and IoUAwareSSD are given it."""
    node, key = cfg.MODEL.IOU_RETINANET, "MODEL.IOU_RETINANET"
    if not 0 <= node.ALPHA <= 1:
        raise InputError(f"{key}.ALPHA lies in [0, 1], but it is {node.ALPHA}.")
    return {
        "alpha": node.ALPHA,
        "iou_loss": part_named(IOU_LOSSES, node.IOU_LOSS_TYPE, f"{key}.IOU_LOSS_TYPE"),
        "iou_loss_weight": node.IOU_LOSS_WEIGHT,
        "iou_target_gradient": node.IOU_TARGET_GRADIENT,
    }


@META_ARCH_REGISTRY.register()
class IoUAwareRetinaNet(BoxLossRetinaNet):
    """RetinaNet whose confidence knows how well a box fits.

    Detections carry `cls_scores` (p) and `pred_ious` beside `scores`.
    """

    @configurable
    def __init__(
        self,
        *,
        alpha: float = 0.5,
        iou_loss: IoULoss = cross_entropy,
        iou_loss_weight: float = 1.0,
        iou_target_gradient: bool = True,
        **kwargs,
    ):
        """
        Args:
            alpha: weight of the class score in the confidence, in [0, 1].
            iou_loss, iou_loss_weight: one of IOU_LOSSES; factor of it.
            iou_target_gradient: let the gradient of the target reach the box branch.
            kwargs: those of BoxLossRetinaNet; `head` is an IoUAwareRetinaNetHead.
        """
        super().__init__(**kwargs)
        self.alpha = alpha
        self.iou_loss = iou_loss
        self.iou_loss_weight = iou_loss_weight
        self.iou_target_gradient = iou_target_gradient

    @classmethod
    def from_config(cls, cfg):
        # The plain head is built too: its random numbers are part of what a seed has always given.
        arguments = super().from_config(cfg)
        shapes = arguments["backbone"].output_shape()
        shapes = [shapes[name] for name in arguments["head_in_features"]]
        return {
            **arguments,
            "head": build_head(IoUAwareRetinaNetHead, cfg, shapes),
            **iou_aware_arguments(cfg),
        }

    def positive_losses(
        self, predictions: list[AnchorPrediction], positives: Positives, shares: list[Share]
    ) -> dict[str, Tensor]:
        """Those of BoxLossRetinaNet and "loss_iou", which is divided by the number of positive
        anchors: the mean over processes, at least 1."""
        losses = super().positive_losses(predictions, positives, shares)
        target = aligned_iou(positives.predicted.boxes, positives.gt_boxes)
        if not self.iou_target_gradient:
            target = target.detach()
        iou_logits = torch.cat([level.iou_logits for level in predictions], dim=1).squeeze(2)
        loss = self.iou_loss(iou_logits[positives.mask].float(), target)
        count = reduce_mean(positives.mask.sum().float()).clamp(min=1)
        return {**losses, "loss_iou": self.iou_loss_weight * loss / count}

    def rank(self, prediction: AnchorPrediction, image: int) -> dict[str, Tensor]:
        probability = prediction.logits[image].float().sigmoid()  # (R, K)
        iou = prediction.iou_logits[image].float().sigmoid()  # (R, 1)
        scores = confidence(probability, iou, self.alpha)
        return {
            "scores": scores * (scores > self.nms.score_threshold),
            "cls_scores": probability,
            "pred_ious": iou.expand_as(probability),
        }
