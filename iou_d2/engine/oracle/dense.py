"""The editors of the dense detectors.

Shape letters and words are those of editors.py. A class score or quality of 1 has the logit inf.
"""

from __future__ import annotations

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor

from iou_d2.detectors.iou_retinanet import IoUAwareRetinaNet
from iou_d2.detectors.point_detector import PointDetector
from iou_d2.detectors.point_heads import PointPrediction, QualityHead
from iou_d2.detectors.refinedet import RefineDet, RefineDetPrediction
from iou_d2.detectors.retinanet import AnchorPrediction, BoxLossRetinaNet
from iou_d2.detectors.ssd import SSD, IoUAwareSSD, SSDPrediction
from iou_d2.detectors.unitbox import PixelPredictions, UnitBox, assign_pixels
from iou_d2.detectors.unitbox_inference import boxes_of, distances_of
from iou_d2.ops.boxes import boxes_around

from .editors import DenseEditor, Foreground, LevelEditor


def with_entries(values: Tensor, where: tuple, entries: Tensor) -> Tensor:
    """A copy of `values` with `entries` at the indices `where`."""
    values = values.clone()
    values[where] = entries.to(values.dtype)
    return values


def with_pixels(maps: Tensor, at: Foreground, channel: Tensor | slice, entries: Tensor) -> Tensor:
    """A copy of maps (N, channels, H, W) with `entries` in a channel, or in all, of pixels."""
    return with_entries(maps.flatten(2), (at.image, channel, at.index), entries).reshape(maps.shape)


def foreground_of_labels(
    labels: Tensor, gt_boxes: Tensor, is_object: Tensor, truth: list[Instances]
) -> Foreground:
    """From what anchors (N, R) learn, and where that is an object (N, R)."""
    image, index = is_object.nonzero(as_tuple=True)
    return Foreground(image, index, labels[is_object], gt_boxes[is_object], truth)


class PointLevel(LevelEditor):
    """Of a PointPrediction, whose final distances are those of its box."""

    def count(self, level: PointPrediction) -> int:
        return len(level.points)

    def points(self, level: PointPrediction, at: Foreground) -> Tensor:
        return level.points[at.index]

    def boxes(self, level: PointPrediction, at: Foreground) -> Tensor:
        distances = level.distances[-1].flatten(2)[at.image, :, at.index].float()
        return boxes_around(self.points(level, at), distances)

    def with_boxes(self, level: PointPrediction, at: Foreground, boxes: Tensor) -> PointPrediction:
        points = self.points(level, at)
        sides = torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], dim=1)
        final = with_pixels(level.distances[-1], at, slice(None), sides)
        return level._replace(distances=(*level.distances[:-1], final))

    def with_class_scores(
        self, level: PointPrediction, at: Foreground, scores: Tensor
    ) -> PointPrediction:
        return level._replace(logits=with_pixels(level.logits, at, at.classes, scores.logit()))

    def with_quality(
        self, level: PointPrediction, at: Foreground, quality: Tensor
    ) -> PointPrediction:
        logits = with_pixels(level.quality_logits, at, torch.zeros_like(at.index), quality.logit())
        return level._replace(quality_logits=logits)

    def without_quality(self, level: PointPrediction) -> PointPrediction:
        return level._replace(quality_logits=None)


class PointEditor(DenseEditor):
    """Of VarifocalNet, ATSS, FCOS and what lies between."""

    has_points = True

    def __init__(self, detector: PointDetector):
        super().__init__(detector, PointLevel(), isinstance(detector.head, QualityHead))

    def foreground(self, predictions, image_sizes, truth) -> Foreground:
        points = [level.points for level in predictions]
        matches = self.detector.match(points, image_sizes, truth)  # (N * R,)
        (flat,) = (matches >= 0).nonzero(as_tuple=True)
        matches, count = matches[flat], sum(map(len, points))
        boxes = torch.cat([x.gt_boxes.tensor for x in truth])[matches]
        classes = torch.cat([x.gt_classes for x in truth])[matches]
        return Foreground(flat // count, flat % count, classes, boxes, truth)


class AnchorLevel(LevelEditor):
    """Of an AnchorPrediction."""

    def __init__(self, transform: Box2BoxTransform):
        self.transform = transform

    def count(self, level: AnchorPrediction) -> int:
        return len(level.anchors)

    def anchors(self, level: AnchorPrediction, at: Foreground) -> Tensor:
        """What the deltas move: (P, 4)."""
        return level.anchors.tensor[at.index]

    def boxes(self, level: AnchorPrediction, at: Foreground) -> Tensor:
        deltas = level.deltas[at.image, at.index].float()
        return self.transform.apply_deltas(deltas, self.anchors(level, at))

    def with_boxes(
        self, level: AnchorPrediction, at: Foreground, boxes: Tensor
    ) -> AnchorPrediction:
        deltas = self.transform.get_deltas(self.anchors(level, at), boxes)
        return level._replace(deltas=with_entries(level.deltas, (at.image, at.index), deltas))

    def with_class_scores(
        self, level: AnchorPrediction, at: Foreground, scores: Tensor
    ) -> AnchorPrediction:
        where = (at.image, at.index, at.classes)
        return level._replace(logits=with_entries(level.logits, where, scores.logit()))

    def with_quality(
        self, level: AnchorPrediction, at: Foreground, quality: Tensor
    ) -> AnchorPrediction:
        where = (at.image, at.index, 0)
        return level._replace(iou_logits=with_entries(level.iou_logits, where, quality.logit()))

    def without_quality(self, level: AnchorPrediction) -> AnchorPrediction:
        return level._replace(iou_logits=None)


class AnchorEditor(DenseEditor):
    """Of RetinaNet, with or without predicted IoUs."""

    def __init__(self, detector: BoxLossRetinaNet):
        level = AnchorLevel(detector.box2box_transform)
        super().__init__(detector, level, isinstance(detector, IoUAwareRetinaNet))

    def foreground(self, predictions, image_sizes, truth) -> Foreground:
        labels, gt_boxes = self.detector.assign(predictions, image_sizes, truth)
        is_object = (labels >= 0) & (labels != self.detector.num_classes)
        return foreground_of_labels(labels, gt_boxes, is_object, truth)


class MultiBoxLevel(AnchorLevel):
    """Of an SSDPrediction. The scores of a softmax sum to 1 and so cannot be overwritten one by
    one as logits: they are from here on probabilities."""

    def with_class_scores(
        self, level: SSDPrediction, at: Foreground, scores: Tensor
    ) -> SSDPrediction:
        where = (at.image, at.index, at.classes)
        return level._replace(scores=with_entries(level.class_scores(), where, scores))

    def without_quality(self, level: SSDPrediction) -> SSDPrediction:
        return level._replace(iou_logits=None)


class SSDEditor(DenseEditor):
    """Of SSD, with or without predicted IoUs."""

    def __init__(self, detector: SSD):
        level = MultiBoxLevel(detector.loss.transform)
        super().__init__(detector, level, isinstance(detector, IoUAwareSSD))

    def foreground(self, predictions, image_sizes, truth) -> Foreground:
        anchors = predictions.anchors.tensor.expand(len(truth), -1, -1)
        num_classes = predictions.logits.shape[-1] - 1
        assignment = self.detector.loss.assign(anchors, truth, num_classes)
        return foreground_of_labels(*assignment, assignment.positive(num_classes), truth)


class RefineDetLevel(MultiBoxLevel):
    """Of a RefineDetPrediction, whose deltas move the refined anchors."""

    def __init__(self, detector: RefineDet):
        super().__init__(detector.odm_loss.transform)
        self.detector = detector

    def anchors(self, level: RefineDetPrediction, at: Foreground) -> Tensor:
        return self.detector.refined_anchors(level)[at.image, at.index]

    def without_quality(self, level: RefineDetPrediction) -> RefineDetPrediction:
        return level


class RefineDetEditor(DenseEditor):
    """Of RefineDet, whose second step is what is overwritten: the objectness stays."""

    def __init__(self, detector: RefineDet):
        super().__init__(detector, RefineDetLevel(detector), has_quality=False)

    def foreground(self, predictions, image_sizes, truth) -> Foreground:
        refined = self.detector.refined_anchors(predictions)
        num_classes = predictions.logits.shape[-1] - 1
        assignment = self.detector.odm_loss.assign(refined, truth, num_classes)
        return foreground_of_labels(*assignment, assignment.positive(num_classes), truth)


class PixelLevel(LevelEditor):
    """Of PixelPredictions, whose points are pixels."""

    def count(self, level: PixelPredictions) -> int:
        return level.logits[0, 0].numel()

    def points(self, level: PixelPredictions, at: Foreground) -> Tensor:
        width = level.logits.shape[-1]
        return torch.stack([at.index % width, at.index // width], dim=1) + 0.5

    def boxes(self, level: PixelPredictions, at: Foreground) -> Tensor:
        distances = level.distances.flatten(2)[at.image, :, at.index]
        return boxes_of(self.points(level, at), distances)

    def with_boxes(
        self, level: PixelPredictions, at: Foreground, boxes: Tensor
    ) -> PixelPredictions:
        sides = distances_of(self.points(level, at), boxes)
        return level._replace(distances=with_pixels(level.distances, at, slice(None), sides))

    def with_class_scores(
        self, level: PixelPredictions, at: Foreground, scores: Tensor
    ) -> PixelPredictions:
        return level._replace(logits=with_pixels(level.logits, at, at.classes, scores.logit()))


class PixelEditor(DenseEditor):
    """Of UnitBox."""

    has_points = True

    def __init__(self, detector: UnitBox):
        super().__init__(detector, PixelLevel(), has_quality=False)

    def foreground(self, predictions, image_sizes, truth) -> Foreground:
        images, indices, objects, seen = [], [], [], 0
        width = predictions.logits.shape[-1]
        for image, (size, of_image) in enumerate(zip(image_sizes, truth)):
            owner = assign_pixels(of_image.gt_boxes.tensor, size, self.detector.region)
            rows, columns = (owner >= 0).nonzero(as_tuple=True)
            indices.append(rows * width + columns)
            images.append(torch.full_like(rows, image))
            objects.append(owner[rows, columns] + seen)
            seen += len(of_image)
        objects = torch.cat(objects)
        boxes = Boxes.cat([x.gt_boxes for x in truth]).tensor[objects]
        classes = torch.cat([x.gt_classes for x in truth])[objects]
        return Foreground(torch.cat(images), torch.cat(indices), classes, boxes, truth)
