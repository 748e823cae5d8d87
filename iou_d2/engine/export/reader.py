"""What reads the predictions of a dense detector for all images of a batch at once.

Shape letters: N images, K classes, R the points or anchors of one level, M candidates of an image.
Boxes are XYXY in pixels of the network input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from detectron2.structures import Boxes
from torch import Tensor

from iou_d2.detectors.dense import DenseNMS

from .candidates import Candidates, suppress


class Reader(ABC):
    """What `predict` of a detector says, for a batch of images of one `size`, (height, width)
    without padding.

    Attributes:
        nms: of the detector.
        doubtful: share of the detections that may be others in another runtime, since equal scores
            are the rule there.
    """

    nms: DenseNMS
    doubtful = 0.0

    @abstractmethod
    def raw(self, predictions: Any, size: tuple[int, int]) -> dict[str, Tensor]:
        """ "boxes" (N, R of all levels, 4) and "scores" (N, R of all levels, K), before any choice;
        a score under the threshold may be 0. Other fields as the scores."""

    @abstractmethod
    def candidates(self, predictions: Any, size: tuple[int, int]) -> Candidates:
        """What NMS is given."""

    def kept(self, candidates: Candidates, num_classes: int) -> Tensor:
        """(N, M), 1 where NMS keeps one of the candidates and 0 where it does not."""
        classes = candidates.classes
        return suppress(
            candidates.boxes,
            candidates.scores,
            torch.zeros_like(classes) if self.nms.class_agnostic else classes,
            1 if self.nms.class_agnostic else num_classes,
            self.nms.nms_threshold,
        )


def number_of_images(level: Any) -> int:
    """N of a level: all of its tensors have it but those of two dimensions."""
    return next(x.shape[0] for x in _tensors(level) if x.dim() > 2)


def _tensors(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    return [x for item in part for x in _tensors(item)] if isinstance(part, tuple) else []


def as_one_image(level: Any) -> Any:
    """The predictions of a level for N images as for a single one, of the points or anchors of all
    of them, image by image.

    `level` is a named tuple of maps (N, channels, H, W), of (N, R, channels), of points or Boxes,
    which all images share, and of tuples of these. `rank` and `boxes` read one image; so one call
    reads all of them, how many there may be.
    """
    count = number_of_images(level)
    return _as_one_image(level, count)


def _as_one_image(part: Any, count: int) -> Any:
    if isinstance(part, Boxes):
        return Boxes(part.tensor.repeat(count, 1))
    if isinstance(part, tuple):
        items = [_as_one_image(item, count) for item in part]
        return type(part)(*items) if hasattr(part, "_fields") else tuple(items)
    if not isinstance(part, Tensor):
        return part
    if part.dim() == 4:
        channels, width = part.shape[1], part.shape[3]
        return part.transpose(0, 1).reshape(1, channels, -1, width)
    if part.dim() == 3:
        return part.reshape(1, -1, part.shape[2])
    return part.repeat(count, 1)
