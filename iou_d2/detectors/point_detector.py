"""Detectors that predict one box from every point: VarifocalNet, ATSS, FCOS and what lies between.

They differ in the parts that a PointDetector is given: the head, which points learn which object
(ops/assign.py), the loss of the classes (ops/losses.py) and of the boxes (ops/box_losses.py), and
the quality of a box: what weighs its loss and what a quality branch or an IoU-aware class score
learns.

Shape letters: N images, K classes, L levels, R points of one level (HW; of all levels where it says
so), P positive points of the batch. Points are (x, y), boxes XYXY, distances those from a point to
the left, top, right and bottom of a box, all in pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import permute_to_N_HWA_K
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from iou_d2.ops.box_losses import BoxLoss, build_box_loss
from iou_d2.ops.boxes import aligned_iou, boxes_around, centerness
from iou_d2.ops.calibration import Calibration, as_predicted
from iou_d2.ops.points import PointGrid

from .calibration import build_calibration
from .dense import PyramidDetector, build_dense_nms, part_named, reduce_mean, round_up
from .point_heads import POINT_HEAD_REGISTRY, PointPrediction
from .point_inference import INFERENCES, PointInference
from .point_parts import (
    Assigner,
    BoxLossMean,
    ClassLoss,
    build_assigner,
    build_box_loss_mean,
    build_class_loss,
    point_offset,
    weights_of_stages,
)


def iou_quality(points: Tensor, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """IoU (P,) of predicted boxes (P, 4) with their ground truth (P, 4), without gradient."""
    return aligned_iou(boxes.detach(), gt_boxes)


def centerness_quality(points: Tensor, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """Centerness (P,) of points (P, 2) in their ground truth (P, 4), whatever the boxes are."""
    return centerness(points, gt_boxes)


@dataclass(frozen=True)
class Quality:
    """How well a box fits.

    Args:
        measure: (points, boxes, ground truth) -> (P,), without gradient.
        field: what detections call the quality that a branch predicts.
    """

    measure: Callable[[Tensor, Tensor, Tensor], Tensor]
    field: str


QUALITIES = {
    "iou": Quality(iou_quality, "pred_ious"),
    "centerness": Quality(centerness_quality, "pred_centernesses"),
}


@META_ARCH_REGISTRY.register()
class PointDetector(PyramidDetector):
    """A dense detector of one box a point. Its predictions are L PointPredictions.

    Detections carry `scores`; those of a head with a quality branch also `cls_scores` (p) and
    `pred_ious` or `pred_centernesses` (q), and their score is sqrt(p * q) or p * q.
    """

    @configurable
    def __init__(
        self,
        *,
        grid: PointGrid,
        num_classes: int,
        assigner: Assigner,
        cls_loss: ClassLoss,
        quality: Quality,
        box_loss: BoxLoss,
        box_loss_weights: Sequence[float],
        box_loss_mean: BoxLossMean,
        inference: PointInference,
        calibration: Calibration = as_predicted,
        **kwargs,
    ):
        """
        Args:
            grid: where the points of the L levels are.
            assigner: which ground truth each point learns.
            cls_loss: (logits, targets) -> sum, see ops/losses.py.
            quality: what weighs box losses and is learnt by class scores or a quality branch.
            box_loss: of the sides of the boxes, whose unit is the stride of their level.
            box_loss_weights: a factor of the box loss for each stage of the head.
            box_loss_mean: what becomes of the losses of the positive boxes.
            inference: how class scores and qualities choose and rank the candidates of NMS.
            calibration: what a predicted quality counts for there.
            kwargs: those of PyramidDetector; `head` makes L PointPredictions of L features.
        """
        super().__init__(**kwargs)
        self.grid = grid
        self.num_classes = num_classes
        self.assigner = assigner
        self.cls_loss = cls_loss
        self.quality = quality
        self.box_loss = box_loss
        self.box_loss_weights = tuple(box_loss_weights)
        self.box_loss_mean = box_loss_mean
        self.inference = inference
        self.calibration = calibration

    @classmethod
    def from_config(cls, cfg):
        arguments = super().from_config(cfg)
        dense, node = cfg.MODEL.RETINANET, cfg.MODEL.POINT_DETECTOR
        shapes = arguments["backbone"].output_shape()
        shapes = [shapes[name] for name in dense.IN_FEATURES]
        head = POINT_HEAD_REGISTRY.get(node.HEAD)(cfg, shapes)
        strides = [shape.stride for shape in shapes]
        key = "MODEL.POINT_DETECTOR"
        return {
            **arguments,
            "head": head,
            "head_in_features": dense.IN_FEATURES,
            "nms": build_dense_nms(cfg, node.CLASS_AGNOSTIC_NMS),
            "grid": PointGrid(strides, point_offset(cfg)),
            "num_classes": dense.NUM_CLASSES,
            "assigner": build_assigner(cfg),
            "cls_loss": build_class_loss(cfg),
            "quality": part_named(QUALITIES, node.QUALITY, f"{key}.QUALITY"),
            "box_loss": build_box_loss(
                node.BOX_LOSS,
                dense.SMOOTH_L1_LOSS_BETA,
                f"{key}.BOX_LOSS",
                cfg.MODEL.INVERTED_BOXES,
            ),
            "box_loss_weights": weights_of_stages(node.BOX_LOSS_WEIGHTS, head.num_stages),
            "box_loss_mean": build_box_loss_mean(cfg),
            "inference": part_named(INFERENCES, node.INFERENCE, f"{key}.INFERENCE"),
            "calibration": build_calibration(cfg),
        }

    def predict(self, images: Tensor) -> list[PointPrediction]:
        """Images (N, 3, H, W) -> a PointPrediction for each of the L levels."""
        features = self.features(images)
        # Not by `_replace`, which torch.compile cannot follow.
        return [
            PointPrediction(said.logits, said.distances, said.quality_logits, points)
            for said, points in zip(self.head(features), self.grid(features))
        ]

    def losses(
        self,
        predictions: list[PointPrediction],
        image_sizes: list[tuple[int, int]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """The losses "loss_cls", "loss_box" of the final boxes, "loss_box_initial" of those before,
        and "loss_quality" where the head has that branch.

        The class loss and that of the quality branch are sums divided by the number of positive
        points, a mean over processes and at least 1; `box_loss_mean` divides the box losses.
        """
        points = [prediction.points for prediction in predictions]
        matches = self.match(points, image_sizes, gt_instances)  # (N * R of all levels,)
        positive = matches >= 0
        matches = matches[positive]
        gt_boxes = torch.cat([x.gt_boxes.tensor for x in gt_instances])[matches]  # (P, 4)
        gt_classes = torch.cat([x.gt_classes for x in gt_instances])[matches]
        centers = torch.cat(points).repeat(len(gt_instances), 1)[positive]  # (P, 2)
        strides = [x.new_full((len(x), 1), stride) for x, stride in zip(points, self.grid.strides)]
        strides = torch.cat(strides).repeat(len(gt_instances), 1)[positive]  # (P, 1)

        losses = {}
        stages = list(zip(*(prediction.distances for prediction in predictions)))
        for stage, weight in zip(stages, self.box_loss_weights):
            boxes = boxes_around(centers, _flatten(stage, 4)[positive])
            # A positive point stays one, however bad its box is.
            quality = self.quality.measure(centers, boxes, gt_boxes).clamp(min=1e-6)
            loss = self.box_loss.of_sides(boxes, gt_boxes, strides)
            name = "loss_box_initial" if len(losses) + 1 < len(stages) else "loss_box"
            losses[name] = weight * self.box_loss_mean(loss, quality)

        count = reduce_mean(positive.sum().float()).clamp(min=1)
        logits = _flatten([x.logits for x in predictions], self.num_classes)
        targets = torch.zeros_like(logits)
        targets[positive, gt_classes] = quality
        losses["loss_cls"] = self.cls_loss(logits, targets) / count
        if predictions[0].quality_logits is not None:
            outputs = _flatten([x.quality_logits for x in predictions], 1)[positive, 0]
            loss = F.binary_cross_entropy_with_logits(outputs, quality, reduction="sum")
            losses["loss_quality"] = loss / count
        return losses

    @torch.no_grad()
    def match(
        self,
        points: list[Tensor],
        image_sizes: list[tuple[int, int]],
        gt_instances: list[Instances],
    ) -> Tensor:
        """For all points of all images, (N * R of all levels,), the index of their object among
        those of the batch, -1 for background.

        An image learns with the points that it would have alone: not those of the padding that
        larger images of the batch bring, but those of its own padding up to the next size that the
        backbone divides (mmdetection's `valid_flags` of `pad_shape`).
        """
        matches, seen = [], 0
        for (height, width), truth in zip(image_sizes, gt_instances):
            multiple = max(self.backbone.size_divisibility, 1)
            size = points[0].new_tensor([round_up(width, multiple), round_up(height, multiple)])
            inside = [(level < size).all(dim=1) for level in points]
            visible = [level[mask] for level, mask in zip(points, inside)]
            index = self.assigner(visible, self.grid.strides, truth.gt_boxes.tensor)
            match = index.new_full((sum(map(len, points)),), -1)
            match[torch.cat(inside)] = torch.where(index >= 0, index + seen, -1)
            matches.append(match)
            seen += len(truth)
        return torch.cat(matches)

    def rank(self, prediction: PointPrediction, image: int) -> dict[str, Tensor]:
        probability = _of_image(prediction.logits, image)  # (R, K)
        threshold = self.nms.score_threshold
        if prediction.quality_logits is None:
            return {"scores": probability * (probability > threshold)}
        quality = self.calibration(_of_image(prediction.quality_logits, image))  # (R, 1)
        return {
            "scores": self.inference.order(probability, quality, threshold),
            "cls_scores": probability,
            self.quality.field: quality.expand_as(probability),
        }

    def boxes(
        self, prediction: PointPrediction, image: int, index: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        distances = _flatten([prediction.distances[-1][image : image + 1]], 4)
        boxes = boxes_around(prediction.points[index], distances[index])
        return clip_boxes_to_image(boxes, image_size) if self.inference.clip else boxes

    def candidates(
        self, prediction: PointPrediction, image: int, image_size: tuple[int, int]
    ) -> Instances:
        """What one level of one image sends to NMS."""
        found = super().candidates(prediction, image, image_size)
        if prediction.quality_logits is not None:
            found.scores = self.inference.score(found.cls_scores, found.get(self.quality.field))
        # A box in the padding is none.
        return found[found.pred_boxes.nonempty()] if self.inference.drop_empty else found


def _of_image(level: Tensor, image: int) -> Tensor:
    """Logits (N, channels, H, W) of a level -> probabilities (R, channels) of an image."""
    return _flatten([level[image : image + 1]], level.shape[1]).sigmoid()


def _flatten(levels: Sequence[Tensor], channels: int) -> Tensor:
    """L levels of (N, channels, H, W) -> (N * R of all levels, channels) float32."""
    flat = [permute_to_N_HWA_K(level, channels) for level in levels]
    return torch.cat(flat, dim=1).float().reshape(-1, channels)
