"""The IoU branch of IoU-Net (arXiv 1807.11590): what predicts the IoU of a box with its object.

Shape letters: N images, R RoIs of the batch, K classes, C channels, L levels. Boxes are XYXY in
pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import build_box_head
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from iou_d2.ops.jitter import jitter_offsets, jittered_boxes

from .dense import part_named, reduce_mean


@dataclass(frozen=True)
class IoUCode:
    """What an output of the branch means.

    Args:
        loss: (outputs, true IoUs in [0, 1]), both (R,), -> their sum, a scalar; 0, with gradients,
            where R is 0.
        decode: outputs (R,) -> predicted IoUs (R,).
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def _smooth_l1(outputs: Tensor, ious: Tensor) -> Tensor:
    return F.smooth_l1_loss(outputs, 2 * ious - 1, reduction="sum")


def _halfway(outputs: Tensor) -> Tensor:
    return (outputs + 1) / 2


def _cross_entropy(outputs: Tensor, ious: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, ious, reduction="sum")


# Smooth L1 with beta 1 on 2 * IoU - 1 (the authors'), or cross-entropy on the IoU after a sigmoid.
IOU_CODES = {
    "smooth_l1": IoUCode(_smooth_l1, _halfway),
    "bce": IoUCode(_cross_entropy, torch.sigmoid),
}


def as_pooled(pooled: Tensor) -> Tensor:
    """What the branch reads where it shares no layer with the box head: the pooled features."""
    return pooled


class IoUBranch(nn.Module):
    """PrRoI pooling -> FC layers like those of the box head -> one IoU a class."""

    @configurable
    def __init__(
        self,
        *,
        pooler: ROIPooler,
        head: nn.Module,
        num_outputs: int,
        code: IoUCode = IOU_CODES["smooth_l1"],
        shared: Callable[[Tensor], Tensor] = as_pooled,
        loss_weight: float = 5.0,
        rois_per_gt: int = 250,
        rois_per_image: int = 1000,
    ):
        """
        Args:
            pooler: that of the box head.
            head: (R, C, P, P), what `shared` puts out -> (R, output_shape.channels).
            num_outputs: K, or 1 for an IoU that knows no class.
            code: what an output means, and its loss.
            shared: between pooler and head, the layers that the box head has too. No module, so
                that their parameters are not the branch's.
            loss_weight: factor of that loss.
            rois_per_gt, rois_per_image: training RoIs, see `jittered_boxes`.
        """
        super().__init__()
        self.pooler = pooler
        self.head = head
        self.iou_pred = nn.Linear(head.output_shape.channels, num_outputs)
        nn.init.normal_(self.iou_pred.weight, std=0.01)
        nn.init.zeros_(self.iou_pred.bias)
        self.code = code
        self.shared = shared
        self.loss_weight = loss_weight
        self.rois_per_gt = rois_per_gt
        self.rois_per_image = rois_per_image
        self.register_buffer("offsets", jitter_offsets(), persistent=False)

    @classmethod
    def from_config(
        cls,
        cfg,
        pooler: ROIPooler,
        input_shape: ShapeSpec,
        shared: Callable[[Tensor], Tensor] = as_pooled,
    ):
        node = cfg.MODEL.IOU_NET
        return {
            "pooler": pooler,
            "head": build_box_head(cfg, input_shape),
            "shared": shared,
            "num_outputs": 1 if node.CLASS_AGNOSTIC else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "code": part_named(IOU_CODES, node.LOSS_TYPE, "MODEL.IOU_NET.LOSS_TYPE"),
            "loss_weight": node.LOSS_WEIGHT,
            "rois_per_gt": node.ROIS_PER_GT,
            "rois_per_image": node.ROIS_PER_IMAGE,
        }

    def forward(
        self,
        features: list[Tensor],
        boxes: list[Boxes],
        classes: Tensor,
        levels: Tensor | None = None,
    ) -> Tensor:
        """Outputs (R,) for the class (R,) of each of the boxes of N images.

        `levels` (R,) fixes the pyramid level of each box, which takes a LayerPooler; by default its
        area decides.
        """
        where = (features, boxes) if levels is None else (features, boxes, levels)
        outputs = self.iou_pred(self.head(self.shared(self.pooler(*where)))).float()
        if outputs.shape[1] == 1:
            return outputs[:, 0]
        return outputs.gather(1, classes[:, None]).squeeze(1)

    def losses(self, features: list[Tensor], targets: list[Instances]) -> dict[str, Tensor]:
        """{"loss_iou": ...}: the mean over jittered boxes, whose number is the mean over processes
        and at least 1. Without a ground truth 0, with gradients."""
        boxes, classes, ious = [], [], []
        for target in targets:
            jittered, index, iou = jittered_boxes(
                target.gt_boxes.tensor,
                target.image_size,
                self.offsets,
                per_gt=self.rois_per_gt,
                per_image=self.rois_per_image,
            )
            boxes.append(Boxes(jittered))
            classes.append(target.gt_classes[index])
            ious.append(iou)
        outputs, ious = self(features, boxes, torch.cat(classes)), torch.cat(ious)
        count = reduce_mean(ious.new_tensor(float(len(ious)))).clamp(min=1)
        return {"loss_iou": self.loss_weight * self.code.loss(outputs, ious) / count}

    def predict(
        self,
        features: list[Tensor],
        boxes: list[Boxes],
        classes: Tensor,
        levels: Tensor | None = None,
    ) -> Tensor:
        """Predicted IoU (R,) of boxes of these classes, in float32 also under autocast, since the
        gradients that refine boxes are small. Differentiable in the boxes through a PrRoIPool; by
        smooth L1 it may leave [0, 1]. Arguments as in `forward`."""
        with torch.autocast(features[0].device.type, enabled=False):
            features = [feature.float() for feature in features]
            return self.code.decode(self(features, boxes, classes, levels))
