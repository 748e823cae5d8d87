"""The IoU branch of IoU-Net (arXiv 1807.11590): what predicts the IoU of a box with its object.

Shape letters: N images, R RoIs of the batch, K classes, C channels, L levels. Boxes are XYXY in
pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import build_box_head
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from iou_d2.ops.boxes import aligned_iou
from iou_d2.ops.jitter import jitter_offsets, jittered_boxes

from .dense import part_named, reduce_mean
from .pooler import LayerPooler

# Boxes of which the CPU predicts the IoU at a time: what is pooled of them, 26 MB for 7 x 7 bins of
# 256 channels, is below the 32 MB from which on glibc's malloc maps new pages for every tensor.
_CPU_BOXES = 512


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


class TrainingRoIs(NamedTuple):
    """Of an image."""

    boxes: Tensor  # (R, 4)
    classes: Tensor  # (R,), of their objects
    ious: Tensor  # (R,), with them


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
        proposals_per_image: int = 0,
        feature_gradient: bool = True,
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
            proposals_per_image: of the proposals at most so many are training RoIs, too.
            feature_gradient: whether the loss reaches what makes the features, and `shared`.
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
        self.proposals_per_image = proposals_per_image
        self.feature_gradient = feature_gradient
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
            "proposals_per_image": node.PROPOSALS_PER_IMAGE,
            "feature_gradient": node.FEATURE_GRADIENT,
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
        pooled = self.shared(self.pooler(*where))
        if self.training and not self.feature_gradient:
            pooled = pooled.detach()
        outputs = self.iou_pred(self.head(pooled)).float()
        if outputs.shape[1] == 1:
            return outputs[:, 0]
        return outputs.gather(1, classes[:, None]).squeeze(1)

    def losses(
        self,
        features: list[Tensor],
        targets: list[Instances],
        proposals: Sequence[Instances] = (),
    ) -> dict[str, Tensor]:
        """{"loss_iou": ...}: the mean over training RoIs, whose number is the mean over processes
        and at least 1. Without a ground truth 0, with gradients.

        Args:
            targets: the ground truth of N images.
            proposals: N, those that have an object, with `proposal_boxes`, `gt_boxes` and
                `gt_classes`; nothing where none are to be learnt from.
        """
        rois = [self._jittered(target) for target in targets]
        if self.proposals_per_image:
            rois = [
                TrainingRoIs(*map(torch.cat, zip(jittered, self._drawn(of_image))))
                for jittered, of_image in zip(rois, proposals, strict=True)
            ]
        boxes, classes, ious = zip(*rois)
        outputs = self(features, [Boxes(x) for x in boxes], torch.cat(classes))
        ious = torch.cat(ious)
        count = reduce_mean(ious.new_tensor(float(len(ious)))).clamp(min=1)
        return {"loss_iou": self.loss_weight * self.code.loss(outputs, ious) / count}

    def _jittered(self, target: Instances) -> TrainingRoIs:
        boxes, index, ious = jittered_boxes(
            target.gt_boxes.tensor,
            target.image_size,
            self.offsets,
            per_gt=self.rois_per_gt,
            per_image=self.rois_per_image,
        )
        return TrainingRoIs(boxes, target.gt_classes[index], ious)

    def _drawn(self, proposals: Instances) -> TrainingRoIs:
        """At most `proposals_per_image` of the proposals of an image."""
        if not len(proposals):  # of an image without objects, which may lack the fields
            nothing = proposals.proposal_boxes.tensor
            return TrainingRoIs(nothing, nothing.new_zeros(0, dtype=torch.int64), nothing[:, 0])
        chosen = proposals[torch.randperm(len(proposals))[: self.proposals_per_image]]
        boxes = chosen.proposal_boxes.tensor
        ious = aligned_iou(boxes, chosen.gt_boxes.tensor)
        return TrainingRoIs(boxes, chosen.gt_classes, ious)

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
            if levels is None and isinstance(self.pooler, LayerPooler):
                levels = self.pooler.assign_levels(boxes)
            on_cpu = classes.device.type == "cpu"
            outputs = self._by_level if on_cpu else self.forward
            return self.code.decode(outputs(features, boxes, classes, levels))

    def _by_level(
        self, features: list[Tensor], boxes: list[Boxes], classes: Tensor, levels: Tensor | None
    ) -> Tensor:
        """What `forward` returns, from boxes that are sorted by level, so many at a time that what
        is pooled is not copied and lies in memory that the process has already."""
        if not len(classes):
            return self(features, boxes, classes, levels)
        tensor = torch.cat([x.tensor for x in boxes])
        image = torch.cat([torch.full_like(classes[: len(x)], n) for n, x in enumerate(boxes)])
        every = torch.arange(len(classes), device=classes.device)
        order = every if levels is None else levels.argsort(stable=True)
        indices, outputs = [], []
        for index in order.split(_CPU_BOXES):
            index = index[image[index].argsort(stable=True)]
            counts = image[index].bincount(minlength=len(boxes)).tolist()
            lists = [Boxes(x) for x in tensor[index].split(counts)]
            level = None if levels is None else levels[index]
            indices.append(index)
            outputs.append(self(features, lists, classes[index], level))
        return torch.cat(outputs)[torch.cat(indices).argsort()]
