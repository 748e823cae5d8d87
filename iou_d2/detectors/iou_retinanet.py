"""IoU-aware RetinaNet (Wu et al., arXiv 1912.05992).

One more 3x3 conv beside the box regression predicts for every anchor the IoU of its decoded box
with the ground truth. Detections are ranked by p^alpha * IoU^(1 - alpha).

Shape letters and words are those of retinanet.py; `iou_logits` are predicted IoUs before the
sigmoid.
"""

from __future__ import annotations

import copy

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from iou_d2.layers.over_maps import over_maps

from .dense import reduce_mean
from .iou_awareness import IoUAwareness, build_iou_awareness
from .retinanet import AnchorPrediction, BoxLossRetinaNet, Positives
from .retinanet_parts import AllLevelsHead, Share, build_head


class IoUAwareRetinaNetHead(AllLevelsHead):
    """AllLevelsHead and the IoU conv, `iou_pred`, on the last feature of the box tower."""

    @configurable
    def __init__(
        self, *, num_anchors: int, conv_dims: list[int], iou_tower: bool = False, **kwargs
    ):
        """
        Args:
            iou_tower: whether the IoU conv reads a tower of its own, `iou_subnet`.
            kwargs: those of AllLevelsHead.
        """
        super().__init__(num_anchors=num_anchors, conv_dims=conv_dims, **kwargs)
        self.iou_pred = nn.Conv2d(conv_dims[-1], num_anchors, kernel_size=3, padding=1)
        nn.init.normal_(self.iou_pred.weight, std=0.01)
        nn.init.zeros_(self.iou_pred.bias)
        self.iou_subnet = like_tower(self.bbox_subnet) if iou_tower else None

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        arguments = super().from_config(cfg, input_shape)
        return {**arguments, "iou_tower": cfg.MODEL.IOU_RETINANET.IOU_TOWER}

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """L features (N, C, H, W) -> L class logits (N, AK, H, W), L deltas (N, 4A, H, W) and
        L IoU logits (N, A, H, W)."""
        logits = over_maps(self.cls_score, over_maps(self.cls_subnet, features))
        box_features = over_maps(self.bbox_subnet, features)
        iou_features = box_features
        if self.iou_subnet is not None:
            iou_features = over_maps(self.iou_subnet, features)
        deltas = over_maps(self.bbox_pred, box_features)
        return logits, deltas, over_maps(self.iou_pred, iou_features)


def like_tower(tower: nn.Sequential) -> nn.Sequential:
    """A tower of the same layers, with weights of its own."""
    tower = copy.deepcopy(tower)
    for layer in tower:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
    return tower


@META_ARCH_REGISTRY.register()
class IoUAwareRetinaNet(BoxLossRetinaNet):
    """RetinaNet whose confidence knows how well a box fits.

    Detections carry `cls_scores` (p) and `pred_ious` beside `scores`.
    """

    @configurable
    def __init__(self, *, iou_awareness: IoUAwareness, **kwargs):
        """
        Args:
            iou_awareness: what the predicted IoU learns, and what it does to the confidence.
            kwargs: those of BoxLossRetinaNet; `head` is an IoUAwareRetinaNetHead.
        """
        super().__init__(**kwargs)
        self.iou_awareness = iou_awareness

    @classmethod
    def from_config(cls, cfg):
        awareness = build_iou_awareness(cfg)
        # The plain head is built too: its random numbers are part of what a seed has always given.
        arguments = super().from_config(cfg)
        shapes = arguments["backbone"].output_shape()
        shapes = [shapes[name] for name in arguments["head_in_features"]]
        return {
            **arguments,
            "head": build_head(IoUAwareRetinaNetHead, cfg, shapes),
            "iou_awareness": awareness,
        }

    def positive_losses(
        self, predictions: list[AnchorPrediction], positives: Positives, shares: list[Share]
    ) -> dict[str, Tensor]:
        """Those of BoxLossRetinaNet and "loss_iou", which is divided by the number of positive
        anchors: the mean over processes, at least 1."""
        losses = super().positive_losses(predictions, positives, shares)
        iou_logits = torch.cat([level.iou_logits for level in predictions], dim=1).squeeze(2)
        loss = self.iou_awareness.loss(
            iou_logits[positives.mask], positives.predicted, positives.gt_boxes
        )
        count = reduce_mean(positives.mask.sum().float()).clamp(min=1)
        return {**losses, "loss_iou": loss / count}

    def rank(self, prediction: AnchorPrediction, image: int) -> dict[str, Tensor]:
        if prediction.iou_logits is None:
            return super().rank(prediction, image)
        probability = prediction.logits[image].float().sigmoid()  # (R, K)
        ranked = self.iou_awareness.rank(probability, prediction.iou_logits[image])
        scores = ranked["scores"]
        return {**ranked, "scores": scores * (scores > self.nms.score_threshold)}
