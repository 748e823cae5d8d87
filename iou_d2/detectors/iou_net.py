"""IoU-Net (Jiang et al., ECCV 2018, arXiv 1807.11590): R-CNN heads that also predict the IoU.

Beside the box head a second head sees the same precisely pooled features and predicts, for each
class, the IoU of a box with its object. It is trained on jittered ground truth and at test time
ranks boxes in NMS and moves them: see iou_net_inference.py.

Shape letters: N images, R RoIs of the batch, K classes, C channels, L levels. Boxes are XYXY in
pixels of the network input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import Tensor

from iou_d2.errors import InputError

from .any_pooler import require_box_head
from .dense import part_named
from .faster_rcnn import BoxLossCascadeROIHeads, BoxLossROIHeads
from .iou_branch import IoUBranch
from .iou_net_inference import (
    GradientAscent,
    Postprocessor,
    build_postprocessor,
    select_boxes,
)
from .pooler import has_box_gradients
from .res5_heads import BoxLossRes5ROIHeads, MeanOfRes5

# Boxes (R, 4 or 4K) and class probabilities (R, K + 1) -> boxes (R, 4 or 4K), one for all classes
# or one for each.
BoxChoice = Callable[[Tensor, Tensor], Tensor]


def box_of_each_class(boxes: Tensor, probabilities: Tensor) -> Tensor:
    """Detectron2."""
    return boxes


def box_of_best_class(boxes: Tensor, probabilities: Tensor) -> Tensor:
    """thisisi3/OpenMMLab-IoUNet."""
    if boxes.shape[1] == 4:
        return boxes
    best = probabilities[:, :-1].argmax(dim=1)
    of_class = boxes.view(len(boxes), boxes.shape[1] // 4, 4)
    return of_class[torch.arange(len(boxes), device=best.device), best]


BOX_CHOICES = {"each_class": box_of_each_class, "best_class": box_of_best_class}


class _IoUNetHeads:
    """What both kinds of IoU-Net heads share; it stands before a class that has `regress`."""

    @configurable
    def __init__(
        self,
        *,
        iou_branch: IoUBranch,
        postprocessor: Postprocessor,
        score_threshold: float,
        box_choice: BoxChoice = box_of_each_class,
        **kwargs,
    ):
        """
        Args:
            iou_branch, postprocessor: the parts of IoU-Net.
            score_threshold: class score over which a box goes on to NMS.
            box_choice: which of the boxes of a proposal.
            kwargs: those of the class behind this one.
        """
        super().__init__(**kwargs)
        self.iou_branch = iou_branch
        self.postprocessor = postprocessor
        self.score_threshold = score_threshold
        self.box_choice = box_choice

    @classmethod
    def from_config(cls, cfg, input_shape):
        arguments = super().from_config(cfg, input_shape)
        iou_branch = cls._init_iou_branch(cfg, input_shape, arguments)
        postprocessor = build_postprocessor(cfg)
        ascends = isinstance(postprocessor.refiner, GradientAscent)
        if ascends and not has_box_gradients(iou_branch.pooler):
            raise InputError(
                f"MODEL.ROI_BOX_HEAD.POOLER_TYPE is {cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE!r}, which "
                "has no gradient for boxes: IoU-Net refines them through 'PrRoIPool' or "
                "'PrRoISPP'. Set one of these, or MODEL.IOU_NET.REFINE_STEPS 0."
            )
        return {
            **arguments,
            "iou_branch": iou_branch,
            "postprocessor": postprocessor,
            "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "box_choice": part_named(BOX_CHOICES, cfg.MODEL.IOU_NET.BOX_OF, "MODEL.IOU_NET.BOX_OF"),
        }

    @classmethod
    def _init_iou_branch(cls, cfg, input_shape, arguments: dict) -> IoUBranch:
        """The branch over the pooler of `arguments`, those of the class behind this one."""
        pooler = arguments["box_pooler"]
        height, width = pooler.output_size
        channels = input_shape[arguments["box_in_features"][0]].channels
        shape = ShapeSpec(channels=channels, height=height, width=width)
        return IoUBranch(cfg, pooler, shape)

    def forward(self, images, features: dict[str, Tensor], proposals, targets=None):
        """See Detectron2's ROIHeads; the losses have a "loss_iou" more."""
        results, losses = super().forward(images, features, proposals, targets)
        if self.training:
            losses.update(self.iou_branch.losses(self.levels(features), targets))
        return results, losses

    def levels(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The features that the box head and the IoU branch pool from, by level."""
        return [features[name] for name in self.in_features]

    def candidates(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> list[Instances]:
        """What N images send to NMS: see `select_boxes`."""
        boxes, probabilities = self.regress(features, proposals)
        boxes = [self.box_choice(*of_image) for of_image in zip(boxes, probabilities)]
        return [
            select_boxes(*of_image, proposal.image_size, self.score_threshold)
            for *of_image, proposal in zip(boxes, probabilities, proposals)
        ]

    def detect(self, features: dict[str, Tensor], candidates: list[Instances]) -> list[Instances]:
        """NMS and refinement of boxes of any origin: see Postprocessor."""
        regress = functools.partial(self.regress_again, features)
        return self.postprocessor(candidates, self.iou_branch, self.levels(features), regress)

    def regress_again(self, features: dict[str, Tensor], detections: list[Instances]) -> None:
        """Replace the `pred_boxes` of N images by what the box head makes of them."""
        proposals = [Instances(x.image_size, proposal_boxes=x.pred_boxes) for x in detections]
        for x, boxes in zip(detections, self.regress(features, proposals)[0]):
            boxes = boxes.view(len(x), boxes.shape[1] // 4, 4)  # (R, 1 or K, 4)
            own = x.pred_classes if boxes.shape[1] > 1 else torch.zeros_like(x.pred_classes)
            x.pred_boxes = Boxes(boxes[torch.arange(len(x), device=own.device), own])
            x.pred_boxes.clip(x.image_size)

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances], *targets):
        if self.training:
            return super()._forward_box(features, proposals, *targets)
        return self.detect(features, self.candidates(features, proposals))


@ROI_HEADS_REGISTRY.register()
class IoUNetROIHeads(_IoUNetHeads, BoxLossROIHeads):
    """StandardROIHeads with an IoU branch; masks and keypoints are those of the refined boxes."""


@ROI_HEADS_REGISTRY.register()
class IoUNetCascadeROIHeads(_IoUNetHeads, BoxLossCascadeROIHeads):
    """CascadeROIHeads with an IoU branch."""


@ROI_HEADS_REGISTRY.register()
class IoUNetRes5ROIHeads(_IoUNetHeads, BoxLossRes5ROIHeads):
    """Res5ROIHeads with an IoU branch, a layout that no paper has: res5 is shared, so that it runs
    once for every box of which the IoU is predicted, and the branch has the fully connected layers
    of MODEL.ROI_BOX_HEAD behind the mean that the box head reads."""

    @classmethod
    def _init_iou_branch(cls, cfg, input_shape, arguments: dict) -> IoUBranch:
        require_box_head(cfg)
        shared = MeanOfRes5(arguments["res5"])
        return IoUBranch(cfg, arguments["pooler"], shared.output_shape, shared)


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
