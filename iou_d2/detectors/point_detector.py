"""Detectors that predict one box from every point: VarifocalNet, ATSS, FCOS and what lies between.

They differ in the parts that a PointDetector is given: the head, which points learn which object
(assign.py), the loss of the classes (losses.py) and of the boxes (box_losses.py), and the quality
of a box: what weighs its loss and what a quality branch or an IoU-aware class score learns.

Shape letters: N images, K classes, L levels, R points of one level (HW; of all levels where it says
so), P positive points of the batch. Points are (x, y), boxes XYXY, distances those from a point to
the left, top, right and bottom of a box, all in pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch.retinanet import permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from iou_d2.ops.assign import ATSSAssigner, FCOSAssigner, level_points
from iou_d2.ops.box_losses import box_side_loss, check_kind
from iou_d2.ops.boxes import aligned_iou, boxes_around, centerness
from iou_d2.ops.losses import focal_loss, quality_focal_loss, varifocal_loss

from .dense import (
    detections_of_image,
    normalized_images,
    postprocess,
    reduce_mean,
    select_candidates,
)
from .point_heads import POINT_HEAD_REGISTRY, PointPrediction
from .visualize import is_time_to_draw, visualize_training

CLASS_LOSSES = {
    "varifocal": varifocal_loss,
    "quality_focal": quality_focal_loss,
    "focal": focal_loss,
}


def iou_quality(points: Tensor, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """IoU (P,) of predicted boxes (P, 4) with their ground truth (P, 4), without gradient."""
    return aligned_iou(boxes.detach(), gt_boxes)


def centerness_quality(points: Tensor, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """Centerness (P,) of points (P, 2) in their ground truth (P, 4), whatever the boxes are."""
    return centerness(points, gt_boxes)


QUALITIES = {"iou": iou_quality, "centerness": centerness_quality}


@META_ARCH_REGISTRY.register()
class PointDetector(nn.Module):
    """A dense detector of one box a point.

    Detections carry `scores`; those of a head with a quality branch also `cls_scores` (p) and
    `pred_ious` (q, be it an IoU or a centerness), and their score is sqrt(p * q).
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        head: nn.Module,
        head_in_features: Sequence[str],
        strides: Sequence[int],
        num_classes: int,
        assigner: Callable,
        cls_loss: Callable,
        quality: Callable,
        box_loss: str = "giou",
        smooth_l1_beta: float = 0.1,
        box_loss_weights: Sequence[float] = (1.5, 2.0),
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        class_agnostic_nms: bool = False,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        vis_period: int = 0,
        input_format: str = "BGR",
    ):
        """
        Args:
            head: L features -> L PointPredictions.
            head_in_features, strides: names of the features, pixels of a cell of each.
            assigner: (points, strides, boxes) -> ground truth of each point, see assign.py; its
                `point_offset` places the points.
            cls_loss: (logits, targets) -> sum, see losses.py.
            quality: (points, boxes, ground truth) -> (P,), without gradient.
            box_loss: see `box_side_loss`; lengths, and `smooth_l1_beta`, are in strides.
            box_loss_weights: factors of the box losses of the stages; a head of one stage takes
                the last.
            test_topk_candidates: what a level of an image sends to NMS at most.
            class_agnostic_nms: let a box suppress those of other classes.
            vis_period: iterations between two pictures of the training; 0 draws none.
            input_format: what the channels of the images are.
        """
        super().__init__()
        check_kind(box_loss, "MODEL.VFNET.BOX_LOSS")
        self.backbone = backbone
        self.head = head
        self.head_in_features = list(head_in_features)
        self.strides = list(strides)
        self.num_classes = num_classes
        self.assigner = assigner
        self.cls_loss = cls_loss
        self.quality = quality
        self.box_loss = box_loss
        self.smooth_l1_beta = smooth_l1_beta
        self.box_loss_weights = tuple(box_loss_weights)
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.class_agnostic_nms = class_agnostic_nms
        self.max_detections_per_image = max_detections_per_image
        self.vis_period = vis_period
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg):
        dense, node = cfg.MODEL.RETINANET, cfg.MODEL.VFNET
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        shapes = [shapes[name] for name in dense.IN_FEATURES]
        return {
            "backbone": backbone,
            "head": POINT_HEAD_REGISTRY.get(node.HEAD)(cfg, shapes),
            "head_in_features": dense.IN_FEATURES,
            "strides": [shape.stride for shape in shapes],
            "num_classes": dense.NUM_CLASSES,
            "assigner": build_assigner(cfg),
            "cls_loss": _named(CLASS_LOSSES, node.CLS_LOSS, "CLS_LOSS"),
            "quality": _named(QUALITIES, node.QUALITY, "QUALITY"),
            "box_loss": node.BOX_LOSS,
            "smooth_l1_beta": dense.SMOOTH_L1_LOSS_BETA,
            "box_loss_weights": node.BOX_LOSS_WEIGHTS,
            "test_score_thresh": dense.SCORE_THRESH_TEST,
            "test_topk_candidates": dense.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": dense.NMS_THRESH_TEST,
            "class_agnostic_nms": node.CLASS_AGNOSTIC_NMS,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]):
        """Losses by name while training; else one {"instances": Instances} an image."""
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.head_in_features]
        points = level_points(features, self.strides, self.assigner.point_offset)
        predictions = self.head(features)
        if self.training:
            if is_time_to_draw(self.vis_period):
                detected = self.detect(points, predictions, 0, images.image_sizes[0])
                visualize_training(batched_inputs[0], detected, self.input_format)
            gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
            return self.losses(points, predictions, images.image_sizes, gt_instances)
        results = [
            self.detect(points, predictions, i, size) for i, size in enumerate(images.image_sizes)
        ]
        return postprocess(results, batched_inputs, images.image_sizes)

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalised images, padded to one size."""
        divisor = self.backbone.size_divisibility
        return normalized_images(batched_inputs, self.pixel_mean, self.pixel_std, divisor)

    def losses(
        self,
        points: list[Tensor],
        predictions: list[PointPrediction],
        image_sizes: list[tuple[int, int]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """The losses by name, each finite and with a gradient to what it predicts from where no
        point is positive.

        The class loss and that of the quality branch are sums divided by the number of positive
        points, the box losses are weighted by the quality of each box and divided by its sum; the
        divisors are means over processes and at least 1.
        """
        matches = self.match(points, image_sizes, gt_instances)  # (N * R of all levels,)
        positive = matches >= 0
        matches = matches[positive]
        gt_boxes = torch.cat([x.gt_boxes.tensor for x in gt_instances])[matches]  # (P, 4)
        gt_classes = torch.cat([x.gt_classes for x in gt_instances])[matches]
        centers = torch.cat(points).repeat(len(gt_instances), 1)[positive]  # (P, 2)
        strides = [x.new_full((len(x), 1), stride) for x, stride in zip(points, self.strides)]
        strides = torch.cat(strides).repeat(len(gt_instances), 1)[positive]  # (P, 1)

        losses = {}
        stages = list(zip(*(prediction.distances for prediction in predictions)))
        if len(self.box_loss_weights) < len(stages):
            raise ValueError(
                f"MODEL.VFNET.BOX_LOSS_WEIGHTS is {list(self.box_loss_weights)}, but the head has "
                f"boxes of {len(stages)} stages."
            )
        for stage, weight in zip(stages, self.box_loss_weights[-len(stages) :]):
            boxes = boxes_around(centers, _flatten(stage, 4)[positive])
            # A positive point stays one, however bad its box is.
            quality = self.quality(centers, boxes, gt_boxes).clamp(min=1e-6)
            loss = box_side_loss(boxes, gt_boxes, self.box_loss, strides, self.smooth_l1_beta)
            name = "loss_box_initial" if len(losses) + 1 < len(stages) else "loss_box"
            divisor = reduce_mean(quality.sum()).clamp(min=1)
            losses[name] = weight * (quality * loss).sum() / divisor

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
        larger images of the batch bring.
        """
        matches, seen = [], 0
        for (height, width), truth in zip(image_sizes, gt_instances):
            multiple = max(self.backbone.size_divisibility, 1)
            size = points[0].new_tensor([_round_up(width, multiple), _round_up(height, multiple)])
            inside = [(level < size).all(dim=1) for level in points]
            visible = [level[mask] for level, mask in zip(points, inside)]
            index = self.assigner(visible, self.strides, truth.gt_boxes.tensor)
            match = index.new_full((sum(map(len, points)),), -1)
            match[torch.cat(inside)] = torch.where(index >= 0, index + seen, -1)
            matches.append(match)
            seen += len(truth)
        return torch.cat(matches)

    @torch.no_grad()
    def detect(
        self,
        points: list[Tensor],
        predictions: list[PointPrediction],
        image: int,
        image_size: tuple[int, int],
    ) -> Instances:
        """Detections of one image of the batch at the size of the network input, best first."""
        return detections_of_image(
            [
                self.candidates(level, prediction, image, image_size)
                for level, prediction in zip(points, predictions)
            ],
            self.test_nms_thresh,
            self.max_detections_per_image,
            self.class_agnostic_nms,
        )

    def candidates(
        self, points: Tensor, prediction: PointPrediction, image: int, image_size: tuple[int, int]
    ) -> Instances:
        """What one level, R points, of one image sends to NMS: boxes inside the image."""
        one = slice(image, image + 1)
        probability = _flatten([prediction.logits[one]], self.num_classes).sigmoid()
        # The threshold is one of class scores, also in FCOS and ATSS.
        scores = probability * (probability > self.test_score_thresh)
        if prediction.quality_logits is not None:
            quality = _flatten([prediction.quality_logits[one]], 1).sigmoid()
            scores = (scores * quality).sqrt()
        chosen = select_candidates(scores, 0.0, self.test_topk_candidates)
        distances = _flatten([prediction.distances[-1][one]], 4)
        boxes = boxes_around(points[chosen.anchors], distances[chosen.anchors])
        result = Instances(
            image_size,
            pred_boxes=Boxes(clip_boxes_to_image(boxes, image_size)),
            scores=chosen.scores,
            pred_classes=chosen.classes,
        )
        if prediction.quality_logits is not None:
            result.cls_scores = probability[chosen.anchors, chosen.classes]
            result.pred_ious = quality[chosen.anchors, 0]
        return result[result.pred_boxes.nonempty()]


def build_assigner(cfg) -> Callable:
    """The assigner that MODEL.VFNET.ASSIGNER names."""
    node = cfg.MODEL.VFNET
    offset = {} if node.POINT_OFFSET is None else {"point_offset": node.POINT_OFFSET}
    if node.ASSIGNER == "atss":
        return ATSSAssigner(anchor_scale=node.ANCHOR_SCALE, **offset)
    if node.ASSIGNER != "fcos":
        raise ValueError(f"MODEL.VFNET.ASSIGNER is 'atss' or 'fcos', not {node.ASSIGNER!r}.")
    lowest = [-1, *node.REGRESS_RANGES[:-1]]
    highest = [*node.REGRESS_RANGES[:-1], 1e8]
    return FCOSAssigner(
        ranges=tuple(zip(lowest, highest)),
        center_sampling_radius=node.CENTER_SAMPLING_RADIUS or None,
        **offset,
    )


def _named(parts: dict[str, Callable], name: str, key: str) -> Callable:
    if name not in parts:
        raise ValueError(f"MODEL.VFNET.{key} is one of {sorted(parts)}, not {name!r}.")
    return parts[name]


def _flatten(levels: Sequence[Tensor], channels: int) -> Tensor:
    """L levels of (N, channels, H, W) -> (N * R of all levels, channels) float32."""
    flat = [permute_to_N_HWA_K(level, channels) for level in levels]
    return torch.cat(flat, dim=1).float().reshape(-1, channels)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
