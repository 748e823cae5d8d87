"""IoU-Net (Jiang et al., ECCV 2018, arXiv 1807.11590): R-CNN heads that also predict the IoU.

Beside the box head a second head sees the same precisely pooled features and predicts, for each
class, the IoU of a box with its object. It is trained on jittered ground truth and at test time
ranks boxes in NMS and moves them: see iou_net_inference.py.

Shape letters: N images, R RoIs of the batch, K classes, C channels, L levels. Boxes are XYXY in
pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import build_box_head
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from iou_d2.ops.jitter import jitter_offsets, jittered_boxes

from .dense import part_named, reduce_mean
from .faster_rcnn import BoxLossCascadeROIHeads, BoxLossROIHeads
from .iou_net_inference import (
    GradientAscent,
    Postprocessor,
    build_postprocessor,
    select_boxes,
)
from .pooler import PrRoIPooler


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
        loss_weight: float = 5.0,
        rois_per_gt: int = 250,
        rois_per_image: int = 1000,
    ):
        """
        Args:
            pooler: that of the box head.
            head: (R, C, P, P) -> (R, output_shape.channels).
            num_outputs: K, or 1 for an IoU that knows no class.
            code: what an output means, and its loss.
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
        self.loss_weight = loss_weight
        self.rois_per_gt = rois_per_gt
        self.rois_per_image = rois_per_image
        self.register_buffer("offsets", jitter_offsets(), persistent=False)

    @classmethod
    def from_config(cls, cfg, pooler: ROIPooler, channels: int):
        side = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        node = cfg.MODEL.IOU_NET
        return {
            "pooler": pooler,
            "head": build_box_head(cfg, ShapeSpec(channels=channels, height=side, width=side)),
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

        `levels` (R,) fixes the pyramid level of each box, which takes a PrRoIPooler; by default its
        area decides.
        """
        where = (features, boxes) if levels is None else (features, boxes, levels)
        outputs = self.iou_pred(self.head(self.pooler(*where))).float()
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
        gradients that refine boxes are small. Differentiable in the boxes through a PrRoIPooler; by
        smooth L1 it may leave [0, 1]. Arguments as in `forward`."""
        with torch.autocast(features[0].device.type, enabled=False):
            features = [feature.float() for feature in features]
            return self.code.decode(self(features, boxes, classes, levels))


class _IoUNetHeads:
    """What both kinds of IoU-Net heads share; it stands before Detectron2's class."""

    @configurable
    def __init__(
        self,
        *,
        iou_branch: IoUBranch,
        postprocessor: Postprocessor,
        score_threshold: float,
        **kwargs,
    ):
        """
        Args:
            iou_branch, postprocessor: the parts of IoU-Net.
            score_threshold: class score over which a box goes on to NMS.
            kwargs: those of Detectron2's class.
        """
        super().__init__(**kwargs)
        self.iou_branch = iou_branch
        self.postprocessor = postprocessor
        self.score_threshold = score_threshold

    @classmethod
    def from_config(cls, cfg, input_shape):
        arguments = super().from_config(cfg, input_shape)
        pooler, postprocessor = arguments["box_pooler"], build_postprocessor(cfg)
        ascends = isinstance(postprocessor.refiner, GradientAscent)
        if ascends and not isinstance(pooler, PrRoIPooler):
            raise ValueError(
                f"MODEL.ROI_BOX_HEAD.POOLER_TYPE is {cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE!r}, which "
                "has no gradient for boxes: IoU-Net refines them through 'PrRoIPool'. Set that, or "
                "MODEL.IOU_NET.REFINE_STEPS 0."
            )
        channels = input_shape[arguments["box_in_features"][0]].channels
        return {
            **arguments,
            "iou_branch": IoUBranch(cfg, pooler, channels),
            "postprocessor": postprocessor,
            "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        }

    def forward(self, images, features: dict[str, Tensor], proposals, targets=None):
        """See Detectron2's ROIHeads; the losses have a "loss_iou" more."""
        results, losses = super().forward(images, features, proposals, targets)
        if self.training:
            losses.update(self.iou_branch.losses(self.levels(features), targets))
        return results, losses

    def levels(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The features that the box head and the IoU branch pool from, by level."""
        return [features[name] for name in self.box_in_features]

    def regress(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """N boxes (R, 4 or 4K) and N class probabilities (R, K + 1) of the `proposal_boxes`."""
        raise NotImplementedError

    def candidates(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> list[Instances]:
        """What N images send to NMS: see `select_boxes`."""
        boxes, probabilities = self.regress(features, proposals)
        return [
            select_boxes(*of_image, proposal.image_size, self.score_threshold)
            for *of_image, proposal in zip(boxes, probabilities, proposals)
        ]

    def detect(self, features: dict[str, Tensor], candidates: list[Instances]) -> list[Instances]:
        """NMS and refinement of boxes of any origin: see Postprocessor."""

        def regress(detections: list[Instances]) -> None:
            proposals = [Instances(x.image_size, proposal_boxes=x.pred_boxes) for x in detections]
            for x, boxes in zip(detections, self.regress(features, proposals)[0]):
                boxes = boxes.view(len(x), boxes.shape[1] // 4, 4)  # (R, 1 or K, 4)
                own = x.pred_classes if boxes.shape[1] > 1 else torch.zeros_like(x.pred_classes)
                x.pred_boxes = Boxes(boxes[torch.arange(len(x), device=own.device), own])
                x.pred_boxes.clip(x.image_size)

        return self.postprocessor(candidates, self.iou_branch, self.levels(features), regress)

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances], *targets):
        if self.training:
            return super()._forward_box(features, proposals, *targets)
        return self.detect(features, self.candidates(features, proposals))


@ROI_HEADS_REGISTRY.register()
class IoUNetROIHeads(_IoUNetHeads, BoxLossROIHeads):
    """StandardROIHeads with an IoU branch; masks and keypoints are those of the refined boxes."""

    def regress(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        pooled = self.box_pooler(self.levels(features), [x.proposal_boxes for x in proposals])
        predictions = self.box_predictor(self.box_head(pooled))
        return (
            self.box_predictor.predict_boxes(predictions, proposals),
            self.box_predictor.predict_probs(predictions, proposals),
        )


@ROI_HEADS_REGISTRY.register()
class IoUNetCascadeROIHeads(_IoUNetHeads, BoxLossCascadeROIHeads):
    """CascadeROIHeads with an IoU branch."""

    def regress(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The boxes (R, 4) of the last stage, and the mean class probabilities of all."""
        image_sizes = [x.image_size for x in proposals]
        boxes, probabilities = [], []
        for stage, predictor in enumerate(self.box_predictor):
            if stage > 0:
                proposals = self._create_proposals_from_boxes(boxes, image_sizes)
            predictions = self._run_stage(self.levels(features), proposals, stage)
            boxes = predictor.predict_boxes(predictions, proposals)
            probabilities.append(predictor.predict_probs(predictions, proposals))
        mean = [sum(stages) * (1.0 / len(stages)) for stages in zip(*probabilities)]
        return boxes, mean


@META_ARCH_REGISTRY.register()
class StandaloneIoUNet(GeneralizedRCNN):
    """GeneralizedRCNN of which only the IoU branch is trained, over a detector that stays as it is.

    Needs ROI heads with an IoU branch. The detector's batch norm keeps its statistics, too.
    """

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.requires_grad_(False)
        self.roi_heads.iou_branch.requires_grad_(True)

    def train(self, mode: bool = True):
        super().train(False)
        self.training = mode
        self.roi_heads.iou_branch.train(mode)
        return self

    def forward(self, batched_inputs: list[dict]):
        """{"loss_iou": ...} while training; else as GeneralizedRCNN."""
        if not self.training:
            return super().forward(batched_inputs)
        targets = [x["instances"].to(self.device) for x in batched_inputs]
        with torch.no_grad():
            features = self.backbone(self.preprocess_image(batched_inputs).tensor)
        heads = self.roi_heads
        return heads.iou_branch.losses(heads.levels(features), targets)
