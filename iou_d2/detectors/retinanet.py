"""RetinaNet (arXiv 1708.02002) with any loss of its boxes.

Names of parameters are those of Detectron2's RetinaNet; losses and detections too, but with the
parts that do as torchvision or mmdetection does.

Shape letters: N images, K classes, A anchors a cell, L levels, R the anchors of one level (HWA; of
all levels where it says so), P positive anchors of the batch. Boxes are XYXY in pixels of the
network input. `logits` are class scores before the sigmoid, `deltas` the (dx, dy, dw, dh) of
Box2BoxTransform, `iou_logits` predicted IoUs before the sigmoid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.retinanet import permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from iou_d2.ops.box_losses import BoxDeltas, BoxLoss, build_box_loss
from iou_d2.ops.focal_loss import focal_loss_of_labels

from .anchors import cell_corners
from .dense import PyramidDetector, build_dense_nms, part_named, round_up
from .retinanet_parts import (
    ALL,
    ASSIGNERS,
    BEFORE_NMS,
    NORMALIZERS,
    AllLevelsHead,
    AnchorMatcher,
    BeforeNMS,
    Normalizer,
    Share,
    as_predicted,
    build_head,
    by_running_mean,
)

# Of the running mean of the number of positive anchors, as Detectron2's RetinaNet has it.
FIRST_NORMALIZER, NORMALIZER_MOMENTUM = 100.0, 0.9


class AnchorPrediction(NamedTuple):
    """What RetinaNet says of the anchors of one level."""

    anchors: Boxes  # R
    logits: Tensor  # (N, R, K)
    deltas: Tensor  # (N, R, 4)
    iou_logits: Tensor | None = None  # (N, R, 1)


class Positives(NamedTuple):
    """The positive anchors of the batch: which of them, their boxes and their ground truth."""

    mask: Tensor  # (N, R of all levels)
    predicted: BoxDeltas  # P
    gt_boxes: Tensor  # (P, 4)

    def of(self, images: slice) -> Positives:
        """Those of some of the images."""
        if images == ALL:
            return self
        image = self.mask.nonzero()[:, 0]
        chosen = (image >= images.start) & (image < images.stop)
        predicted = BoxDeltas(
            self.predicted.deltas[chosen], self.predicted.anchors[chosen], self.predicted.transform
        )
        return Positives(self.mask[images], predicted, self.gt_boxes[chosen])


@META_ARCH_REGISTRY.register()
class BoxLossRetinaNet(PyramidDetector):
    """RetinaNet whose box loss is a part. Its predictions are L AnchorPredictions.

    With the losses that Detectron2's RetinaNet has, losses and detections are equal to its own.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        anchor_generator: nn.Module,
        box2box_transform: Box2BoxTransform,
        anchor_matcher: AnchorMatcher,
        padding_is_background: bool = True,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        box_loss: BoxLoss,
        box_loss_weight: float = 1.0,
        normalizer: Normalizer = by_running_mean,
        before_nms: BeforeNMS = as_predicted,
        **kwargs,
    ):
        """
        Args:
            anchor_generator: L features -> L Boxes of R anchors.
            box2box_transform: from deltas to boxes and back.
            anchor_matcher: which ground truth an anchor learns, if any: Detectron2's Matcher, or
                what has its arguments and results.
            padding_is_background: whether the anchors in the padding that larger images of the
                batch bring learn that they are background, or nothing.
            focal_loss_alpha, focal_loss_gamma: of the class loss, arXiv 1708.02002.
            box_loss, box_loss_weight: of the boxes of positive anchors; factor of it.
            normalizer: one of NORMALIZERS, for the losses of classes and boxes.
            before_nms: one of BEFORE_NMS.
            kwargs: those of PyramidDetector; `head` makes L logits and L deltas of L features.
        """
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.anchor_matcher = anchor_matcher
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.box_loss = box_loss
        self.box_loss_weight = box_loss_weight
        self.padding_is_background = padding_is_background
        self.normalizer = normalizer
        self.before_nms = before_nms
        self.loss_normalizer = FIRST_NORMALIZER

    @classmethod
    def from_config(cls, cfg):
        arguments, node = super().from_config(cfg), cfg.MODEL.RETINANET
        shapes = arguments["backbone"].output_shape()
        shapes = [shapes[name] for name in node.IN_FEATURES]
        key = "MODEL.RETINANET"
        return {
            **arguments,
            "head": build_head(AllLevelsHead, cfg, shapes),
            "head_in_features": node.IN_FEATURES,
            "nms": build_dense_nms(cfg),
            "num_classes": node.NUM_CLASSES,
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "box2box_transform": Box2BoxTransform(weights=node.BBOX_REG_WEIGHTS),
            **part_named(ASSIGNERS, node.ASSIGNER, f"{key}.ASSIGNER")(node),
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "box_loss": build_box_loss(
                node.BBOX_REG_LOSS_TYPE,
                node.SMOOTH_L1_LOSS_BETA,
                f"{key}.BBOX_REG_LOSS_TYPE",
                cfg.MODEL.INVERTED_BOXES,
            ),
            "box_loss_weight": node.BBOX_REG_LOSS_WEIGHT,
            "normalizer": part_named(NORMALIZERS, node.NORMALIZER, f"{key}.NORMALIZER"),
            "before_nms": part_named(BEFORE_NMS, node.BEFORE_NMS, f"{key}.BEFORE_NMS"),
        }

    def predict(self, images: Tensor) -> list[AnchorPrediction]:
        """Images (N, 3, H, W) -> an AnchorPrediction for each of the L levels."""
        features = self.features(images)
        anchors = self.anchor_generator(features)
        channels = (self.num_classes, 4, 1)  # of logits, deltas and, if there are any, iou_logits
        levels = [
            [permute_to_N_HWA_K(x, size) for x in maps]
            for maps, size in zip(self.head(features), channels)
        ]
        return [AnchorPrediction(*level) for level in zip(anchors, *levels)]

    def losses(
        self,
        predictions: list[AnchorPrediction],
        image_sizes: list[tuple[int, int]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """The losses "loss_cls" and "loss_box_reg", both divided as the normaliser says."""
        anchors = Boxes.cat([level.anchors for level in predictions])
        labels, gt_boxes = self.assign(predictions, image_sizes, gt_instances)
        mask = (labels >= 0) & (labels != self.num_classes)  # (N, R)
        shares = self._shares(mask)
        losses = {"loss_cls": self.class_loss(predictions, labels, shares)}
        positives = Positives(
            mask,
            BoxDeltas(
                torch.cat([level.deltas for level in predictions], dim=1)[mask],
                anchors.tensor.expand(len(labels), -1, -1)[mask],
                self.box2box_transform,
            ),
            gt_boxes[mask],
        )
        losses.update(self.positive_losses(predictions, positives, shares))
        return losses

    def class_loss(
        self, predictions: list[AnchorPrediction], labels: Tensor, shares: list[Share]
    ) -> Tensor:
        """Focal loss of the anchors that are labelled, with `labels` (N, R of all levels)."""
        logits = [level.logits for level in predictions]
        if logits[0].is_cuda:  # which would wait for the launches of every level
            logits = [torch.cat(logits, dim=1)]
        of_levels = labels.split([x.shape[1] for x in logits], dim=1)
        total = 0
        for images, divisor in shares:
            for level, of_level in zip(logits, of_levels):
                loss = focal_loss_of_labels(
                    level[images].flatten(0, 1),
                    of_level[images].flatten(),
                    self.focal_loss_alpha,
                    self.focal_loss_gamma,
                )
                total = total + loss / divisor
        return total

    def positive_losses(
        self, predictions: list[AnchorPrediction], positives: Positives, shares: list[Share]
    ) -> dict[str, Tensor]:
        """The losses of positive anchors by name."""
        total = 0
        for images, divisor in shares:
            chosen = positives.of(images)
            loss = self.box_loss.of_deltas(chosen.predicted, chosen.gt_boxes)
            total = total + self.box_loss_weight * loss / divisor
        return {"loss_box_reg": total}

    def assign(
        self,
        predictions: list[AnchorPrediction],
        image_sizes: list[tuple[int, int]],
        gt_instances: list[Instances],
    ) -> tuple[Tensor, Tensor]:
        """What the anchors of the predictions learn: as `label_anchors`, where the padding counts
        as `padding_is_background` says."""
        if not self.padding_is_background:
            return self._label_inside(predictions, image_sizes, gt_instances)
        anchors = Boxes.cat([level.anchors for level in predictions])
        return self.label_anchors(anchors, gt_instances)

    @torch.no_grad()
    def label_anchors(self, anchors: Boxes, gt_instances: list[Instances]) -> tuple[Tensor, Tensor]:
        """What each anchor of each image learns.

        Returns:
            labels: (N, R of all levels), a class, K for background, -1 for neither.
            gt_boxes: (N, R of all levels, 4), undefined where the label is no class.
        """
        labels, gt_boxes = zip(*(self._label(anchors, truth) for truth in gt_instances))
        return torch.stack(labels), torch.stack(gt_boxes)

    @torch.no_grad()
    def _label_inside(
        self,
        predictions: list[AnchorPrediction],
        image_sizes: list[tuple[int, int]],
        gt_instances: list[Instances],
    ) -> tuple[Tensor, Tensor]:
        """As `label_anchors`, with -1 for the cells that an image would not have if it were alone:
        those in the padding that larger images of the batch bring."""
        anchors = Boxes.cat([level.anchors for level in predictions])
        counts = self.anchor_generator.num_cell_anchors
        corners = torch.cat(
            [cell_corners(level.anchors, count) for level, count in zip(predictions, counts)]
        )
        labels = torch.full((len(gt_instances), len(anchors)), -1, device=anchors.device)
        gt_boxes = anchors.tensor.new_zeros(*labels.shape, 4)
        multiple = max(self.backbone.size_divisibility, 1)
        for image, ((height, width), truth) in enumerate(zip(image_sizes, gt_instances)):
            size = corners.new_tensor([round_up(width, multiple), round_up(height, multiple)])
            inside = (corners < size).all(dim=1)
            labels[image, inside], gt_boxes[image, inside] = self._label(anchors[inside], truth)
        return labels, gt_boxes

    def _label(self, anchors: Boxes, truth: Instances) -> tuple[Tensor, Tensor]:
        """Of one image: (R,) and (R, 4)."""
        if len(truth) == 0:
            background = torch.full((len(anchors),), self.num_classes, device=anchors.device)
            return background, torch.zeros_like(anchors.tensor)
        matches, match_labels = self.anchor_matcher(pairwise_iou(truth.gt_boxes, anchors))
        classes = truth.gt_classes[matches]
        classes[match_labels == 0] = self.num_classes
        classes[match_labels == -1] = -1
        return classes, truth.gt_boxes.tensor[matches]

    def _shares(self, positive: Tensor) -> list[Share]:
        """Of the batch with these positive anchors (N, R); updates the running mean."""
        counts = positive.sum(dim=1).tolist()
        get_event_storage().put_scalar("num_pos_anchors", sum(counts) / len(counts))
        self.loss_normalizer = NORMALIZER_MOMENTUM * self.loss_normalizer + (
            1 - NORMALIZER_MOMENTUM
        ) * max(sum(counts), 1)
        return self.normalizer(counts, self.loss_normalizer)

    def candidates(
        self, prediction: AnchorPrediction, image: int, image_size: tuple[int, int]
    ) -> Instances:
        return self.before_nms(super().candidates(prediction, image, image_size))

    def rank(self, prediction: AnchorPrediction, image: int) -> dict[str, Tensor]:
        probability = prediction.logits[image].float().sigmoid()  # (R, K)
        return {"scores": probability * (probability > self.nms.score_threshold)}

    def boxes(
        self, prediction: AnchorPrediction, image: int, index: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        return self.box2box_transform.apply_deltas(
            prediction.deltas[image, index].float(), prediction.anchors.tensor[index]
        )
