"""How predictions are read and overwritten where a detector's assigner sees an object.

Shape letters: N images, K classes, R points or anchors of an image (of one level where it says so),
P of them that the assigner gives an object, in all images. Boxes are XYXY in pixels of the network
input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from detectron2.structures import ImageList, Instances
from torch import Tensor

from iou_d2.detectors.dense import DenseDetector


class Foreground(NamedTuple):
    """The points or anchors (or proposals) that the assigner gives an object."""

    image: Tensor  # (P,)
    index: Tensor  # (P,), among the R of all levels of the image
    classes: Tensor  # (P,), of the object
    boxes: Tensor  # (P, 4), of the object
    truth: list[Instances]  # all objects of the N images, also those without a point

    def part(self, chosen: Tensor, start: int = 0) -> Foreground:
        """Those of a mask (P,), counted from `start`."""
        return Foreground(
            self.image[chosen],
            self.index[chosen] - start,
            self.classes[chosen],
            self.boxes[chosen],
            self.truth,
        )


class Editor(ABC):
    """Reads and overwrites the predictions of one detector; leaves those that it is given alone.

    Attributes:
        has_quality: whether the detector predicts how well a box fits. Then there is also
            `with_quality(predictions, foreground, quality)`: predictions with `quality` (P,) in the
            place of that predicted.
        has_points: whether its boxes belong to points, which have a centerness. Then there is also
            `points(predictions, foreground)`: where they are, (P, 2) x and y.
        has_proposals: whether it is a two-stage detector. Then there is also
            `with_true_rank(predictions, foreground)`: predictions whose NMS ranks by the true IoU.
    """

    has_quality = False
    has_points = False
    has_proposals = False

    @abstractmethod
    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """The images as the network takes them."""

    @abstractmethod
    def predict(self, images: ImageList) -> Any:
        """What the network says of N images."""

    @abstractmethod
    def detect(self, predictions: Any, image_sizes: list[tuple[int, int]]) -> list[Instances]:
        """The detections of N images, best first."""

    @abstractmethod
    def foreground(
        self, predictions: Any, image_sizes: list[tuple[int, int]], truth: list[Instances]
    ) -> Foreground:
        """What learns an object in training, in the images as they would be alone."""

    @abstractmethod
    def boxes(self, predictions: Any, foreground: Foreground) -> Tensor:
        """The predicted boxes (P, 4), not cut at the image."""

    @abstractmethod
    def with_boxes(self, predictions: Any, foreground: Foreground, boxes: Tensor) -> Any:
        """Predictions with `boxes` (P, 4) in the place of those predicted."""

    @abstractmethod
    def with_class_scores(self, predictions: Any, foreground: Foreground, scores: Tensor) -> Any:
        """Predictions with `scores` (P,) in the place of those of the class of the object. All
        other class scores stay."""

    def without_quality(self, predictions: Any) -> Any:
        """Predictions of which the class score alone ranks."""
        return predictions


class LevelEditor(ABC):
    """Editor of what a dense detector says of one level, or of all where it has them in one. The
    methods are those of Editor; `at` has the index of a point in its level."""

    @abstractmethod
    def count(self, level: Any) -> int:
        """R of the level."""

    @abstractmethod
    def boxes(self, level: Any, at: Foreground) -> Tensor: ...

    @abstractmethod
    def with_boxes(self, level: Any, at: Foreground, boxes: Tensor) -> Any: ...

    @abstractmethod
    def with_class_scores(self, level: Any, at: Foreground, scores: Tensor) -> Any: ...

    def without_quality(self, level: Any) -> Any:
        return level


class DenseEditor(Editor):
    """Of a DenseDetector, whose predictions are one level or a list of levels."""

    def __init__(self, detector: DenseDetector, level: LevelEditor, has_quality: bool):
        self.detector = detector
        self.level = level
        self.has_quality = has_quality

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        return self.detector.preprocess_image(batched_inputs)

    def predict(self, images: ImageList) -> Any:
        return self.detector.predict(images.tensor)

    def detect(self, predictions: Any, image_sizes: list[tuple[int, int]]) -> list[Instances]:
        return self.detector.detect(predictions, image_sizes)

    def boxes(self, predictions: Any, foreground: Foreground) -> Tensor:
        return self._read(self.level.boxes, predictions, foreground)

    def points(self, predictions: Any, foreground: Foreground) -> Tensor:
        return self._read(self.level.points, predictions, foreground)

    def with_boxes(self, predictions: Any, foreground: Foreground, boxes: Tensor) -> Any:
        return self._write(self.level.with_boxes, predictions, foreground, boxes)

    def with_class_scores(self, predictions: Any, foreground: Foreground, scores: Tensor) -> Any:
        return self._write(self.level.with_class_scores, predictions, foreground, scores)

    def with_quality(self, predictions: Any, foreground: Foreground, quality: Tensor) -> Any:
        return self._write(self.level.with_quality, predictions, foreground, quality)

    def without_quality(self, predictions: Any) -> Any:
        if not isinstance(predictions, list):
            return self.level.without_quality(predictions)
        return [self.level.without_quality(level) for level in predictions]

    def _read(self, read, predictions: Any, foreground: Foreground) -> Tensor:
        """What `read` says of each level, in the order of `foreground`."""
        parts, order = [], []
        for level, chosen, start in self._levels(predictions, foreground):
            parts.append(read(level, foreground.part(chosen, start)))
            order.append(chosen.nonzero()[:, 0])
        values = torch.cat(parts)
        return torch.empty_like(values).index_copy_(0, torch.cat(order), values)

    def _write(self, write, predictions: Any, foreground: Foreground, values: Tensor) -> Any:
        levels = [
            write(level, foreground.part(chosen, start), values[chosen])
            for level, chosen, start in self._levels(predictions, foreground)
        ]
        return levels if isinstance(predictions, list) else levels[0]

    def _levels(self, predictions: Any, foreground: Foreground):
        """Each level, which of `foreground` lie in it (P,), and the index of its first point."""
        start = 0
        for level in predictions if isinstance(predictions, list) else [predictions]:
            end = start + self.level.count(level)
            yield level, (foreground.index >= start) & (foreground.index < end), start
            start = end
