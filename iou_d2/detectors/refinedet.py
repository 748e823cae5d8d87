"""RefineDet (Zhang et al., arXiv 1711.06897).

A first step, the anchor refinement module (ARM), tells objects from background and moves anchors to
them. A second one, the object detection module (ODM), reads features that transfer connection
blocks make of the same levels, and classifies and moves the refined anchors.

Shape letters and words are those of multibox.py. The ARM has one class: `arm_logits` (N, R, 2) are
object and background, in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from iou_d2.errors import InputError

from .multibox import (
    IGNORED,
    Assignment,
    LevelConvs,
    MultiBoxLoss,
    build_matcher,
    build_multibox_loss,
    shapes_of,
)
from .multibox_detector import MultiBoxDetector
from .multibox_inference import class_scores


class RefineDetPrediction(NamedTuple):
    """What RefineDet says of the anchors of all levels."""

    anchors: Boxes  # R
    arm_logits: Tensor  # (N, R, 2)
    arm_deltas: Tensor  # (N, R, 4), from the anchors
    logits: Tensor  # (N, R, K + 1), the background last
    deltas: Tensor  # (N, R, 4), from the refined anchors
    # (N, R, K), in the place of the softmax of `logits`: for what is no softmax.
    scores: Tensor | None = None

    def class_scores(self, images: int | slice = slice(None)) -> Tensor:
        """(N, R, K), or (R, K) of one image."""
        if self.scores is None:
            return class_scores(self.logits[images])
        return self.scores[images]


class TransferBlock(nn.Module):
    """From a feature of the backbone, and the finished one of the next coarser level, to a feature
    that the ODM reads."""

    def __init__(self, in_channels: int, channels: int, is_coarsest: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.up = None if is_coarsest else nn.ConvTranspose2d(channels, channels, 2, stride=2)
        for layer in self.children():
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, coarser: Tensor | None) -> Tensor:
        """(N, C, H, W), and (N, channels, h, w) of at least half of H and W -> (N, channels, H, W).

        What the coarser level has beyond H and W is cut off: maps are rounded up.
        """
        x = self.conv2(F.relu(self.conv1(x)))
        if self.up is not None:
            x = x + self.up(coarser)[..., : x.shape[-2], : x.shape[-1]]
        return F.relu(self.conv3(F.relu(x)))


class RefineDetHead(nn.Module):
    """The convolutions of ARM and ODM, and the transfer connection blocks between them."""

    def __init__(
        self,
        shapes: Sequence[ShapeSpec],
        num_cell_anchors: Sequence[int],
        num_classes: int,
        channels: int = 256,
    ):
        """
        Args:
            shapes: of the L features; each has half of the resolution of the one before.
            num_cell_anchors: anchors of a cell of each.
            channels: of the features that the ODM reads.
        """
        super().__init__()
        self.arm_score = LevelConvs(shapes, num_cell_anchors, 2)
        self.arm_bbox = LevelConvs(shapes, num_cell_anchors, 4)
        last = len(shapes) - 1
        self.transfer = nn.ModuleList(
            TransferBlock(shape.channels, channels, is_coarsest=level == last)
            for level, shape in enumerate(shapes)
        )
        transferred = [ShapeSpec(channels=channels)] * len(shapes)
        self.odm_score = LevelConvs(transferred, num_cell_anchors, num_classes + 1)
        self.odm_bbox = LevelConvs(transferred, num_cell_anchors, 4)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """L features (N, C, H, W) -> the tensors of a RefineDetPrediction."""
        transferred, coarser = [], None
        for block, feature in zip(reversed(self.transfer), reversed(features)):
            coarser = block(feature, coarser)
            transferred.insert(0, coarser)
        return (
            self.arm_score(features),
            self.arm_bbox(features),
            self.odm_score(transferred),
            self.odm_bbox(transferred),
        )


@META_ARCH_REGISTRY.register()
class RefineDet(MultiBoxDetector):
    """A dense detector of two steps; its predictions are a RefineDetPrediction."""

    @configurable
    def __init__(
        self,
        *,
        anchor_generator: nn.Module,
        arm_loss: MultiBoxLoss,
        odm_loss: MultiBoxLoss,
        min_objectness: float = 0.01,
        **kwargs,
    ):
        """
        Args:
            anchor_generator: L features -> L Boxes.
            arm_loss, odm_loss: of the first and the second step.
            min_objectness: anchors with less are no negatives of the ODM and no detections.
            kwargs: those of MultiBoxDetector; `head` makes the tensors of a RefineDetPrediction.
        """
        super().__init__(**kwargs)
        self.anchor_generator = anchor_generator
        self.arm_loss = arm_loss
        self.odm_loss = odm_loss
        self.min_objectness = min_objectness

    @classmethod
    def from_config(cls, cfg):
        arguments = super().from_config(cfg)
        dense, shared, node = cfg.MODEL.RETINANET, cfg.MODEL.MULTIBOX, cfg.MODEL.REFINEDET
        if not 0 <= node.MIN_OBJECTNESS <= 1:
            raise InputError(
                f"MODEL.REFINEDET.MIN_OBJECTNESS lies in [0, 1], but it is {node.MIN_OBJECTNESS}."
            )
        shapes = shapes_of(cfg, arguments["backbone"].output_shape())
        anchors = build_anchor_generator(cfg, shapes)
        key = "MODEL.REFINEDET.ARM_IOU_THRESHOLDS"
        arm_matcher = build_matcher(node.ARM_IOU_THRESHOLDS, key)
        odm_matcher = build_matcher(shared.IOU_THRESHOLDS, "MODEL.MULTIBOX.IOU_THRESHOLDS")
        return {
            **arguments,
            "head": RefineDetHead(shapes, anchors.num_anchors, dense.NUM_CLASSES, node.CHANNELS),
            "anchor_generator": anchors,
            "arm_loss": build_multibox_loss(cfg, arm_matcher),
            "odm_loss": build_multibox_loss(cfg, odm_matcher),
            "min_objectness": node.MIN_OBJECTNESS,
        }

    def predict(self, images: Tensor) -> RefineDetPrediction:
        """Images (N, 3, H, W) -> what both steps say of each of their anchors."""
        features = self.features(images)
        return RefineDetPrediction(Boxes.cat(self.anchor_generator(features)), *self.head(features))

    def losses(
        self,
        predictions: RefineDetPrediction,
        image_sizes: list[tuple[int, int]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """The losses "loss_arm_cls", "loss_arm_box", "loss_odm_cls" and "loss_odm_box", those of a
        step divided by the number of its positive anchors: the mean over processes, at least 1.

        No gradient of the second step reaches what the first one says; they share the backbone.
        """
        num_classes = predictions.logits.shape[-1] - 1
        refined = self.refined_anchors(predictions)
        assignment = self.odm_loss.assign(refined, gt_instances, num_classes)
        assignment = self.without_easy_negatives(assignment, predictions)
        odm = self.odm_loss(refined, predictions.logits, predictions.deltas, assignment)

        anchors = predictions.anchors.tensor.expand_as(refined)
        assignment = self.arm_loss.assign(anchors, [_of_one_class(x) for x in gt_instances], 1)
        arm = self.arm_loss(anchors, predictions.arm_logits, predictions.arm_deltas, assignment)
        return {**self.divided(arm, "loss_arm"), **self.divided(odm, "loss_odm")}

    @torch.no_grad()
    def refined_anchors(self, predictions: RefineDetPrediction) -> Tensor:
        """Where the first step moves the anchors of all images, without gradient: (N, R, 4)."""
        deltas = predictions.arm_deltas
        anchors = predictions.anchors.tensor.repeat(deltas.shape[0], 1)
        moved = self.arm_loss.transform.apply_deltas(deltas.flatten(0, 1), anchors)
        return moved.view(deltas.shape)

    @torch.no_grad()
    def without_easy_negatives(
        self, assignment: Assignment, predictions: RefineDetPrediction
    ) -> Assignment:
        """`assignment` whose background is no anchor of low objectness; an object is learnt all the
        same (the authors' code, where other ports do the reverse)."""
        objectness = class_scores(predictions.arm_logits).squeeze(-1)  # (N, R)
        background = predictions.logits.shape[-1] - 1
        easy = (assignment.labels == background) & (objectness < self.min_objectness)
        return assignment._replace(labels=assignment.labels.masked_fill(easy, IGNORED))

    def rank(self, predictions: RefineDetPrediction, image: int) -> dict[str, Tensor]:
        objectness = class_scores(predictions.arm_logits[image])  # (R, 1)
        scores = predictions.class_scores(image)
        return {"scores": scores * (objectness >= self.min_objectness)}

    def boxes(self, predictions: RefineDetPrediction, image: int, index: Tensor | slice) -> Tensor:
        refined = self.arm_loss.transform.apply_deltas(
            predictions.arm_deltas[image, index], predictions.anchors.tensor[index]
        )
        return self.odm_loss.transform.apply_deltas(predictions.deltas[image, index], refined)


def _of_one_class(truth: Instances) -> Instances:
    return Instances(
        truth.image_size,
        gt_boxes=truth.gt_boxes,
        gt_classes=torch.zeros_like(truth.gt_classes),
    )
