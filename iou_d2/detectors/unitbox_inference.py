"""Boxes at pixels: the distances to their sides, and detections from maps of them.

Shape letters: K classes, H x W pixels of an image. Boxes are XYXY. `distances` are those from a
point to the sides of its box in pixels: top, bottom, left, right (arXiv 1608.01471). The pixel in
row i and column j has its centre at the point (j + 0.5, i + 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .dense import DenseNMS, first, select_candidates


def boxes_of(points: Tensor, distances: Tensor) -> Tensor:
    """Points (..., 2) as x, y and distances (..., 4) -> boxes (..., 4)."""
    x, y = points.unbind(-1)
    top, bottom, left, right = distances.unbind(-1)
    return torch.stack([x - left, y - top, x + right, y + bottom], dim=-1)


def distances_of(points: Tensor, boxes: Tensor) -> Tensor:
    """The inverse of `boxes_of`: negative where a point lies outside of its box."""
    x, y = points.unbind(-1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([y - y1, y2 - y, x - x1, x2 - x], dim=-1)


@dataclass
class PixelNMS:
    """Detections from the pixels whose confidence peaks, by class-wise NMS (ours), where each class
    is a level of its own.

    Pixels beside a more confident one are left out: they have nearly the same box and lose in NMS,
    and one large object would fill up the best `topk`.
    """

    nms: DenseNMS

    def __call__(self, logits: Tensor, distances: Tensor) -> Instances:
        """Maps (K, H, W) and (4, H, W) of one image -> its detections, best first."""
        return self.suppress(self.candidates(logits, distances))

    @torch.no_grad()
    def candidates(self, logits: Tensor, distances: Tensor) -> list[Instances]:
        """The candidates of NMS: K Instances."""
        peaks = logits == F.max_pool2d(logits, kernel_size=3, stride=1, padding=1)
        confidence = (logits.sigmoid() * peaks).flatten(1)  # (K, HW)
        by_class = []
        for index, scores in enumerate(confidence):
            chosen = select_candidates(scores[:, None], self.nms.score_threshold, self.nms.topk)
            by_class.append(_read_boxes(distances, chosen.anchors, chosen.scores, index))
        return by_class

    def suppress(self, candidates: Sequence[Instances]) -> Instances:
        return self.nms(candidates)


@dataclass
class EllipseFit:
    """Detections as in the paper: ellipses are fitted to the connected regions of confident pixels,
    and each stands for the box at its centre pixel. There is no NMS.

    The paper names no score; this is the highest confidence of the region.
    """

    threshold: float
    max_detections: int

    def __call__(self, logits: Tensor, distances: Tensor) -> Instances:
        """Maps (K, H, W) and (4, H, W) of one image -> its detections, best first."""
        return self.suppress(self.candidates(logits, distances))

    @torch.no_grad()
    def candidates(self, logits: Tensor, distances: Tensor) -> list[Instances]:
        """All that is found: K Instances."""
        by_class = []
        for index, confidence in enumerate(logits.sigmoid()):
            pixels, scores = _fit_ellipses(confidence.cpu().numpy(), self.threshold)
            pixels, scores = pixels.to(logits.device), scores.to(logits.device)
            by_class.append(_read_boxes(distances, pixels, scores, index))
        return by_class

    def suppress(self, candidates: Sequence[Instances]) -> Instances:
        """The best of them."""
        detections = Instances.cat(list(candidates))
        best = detections.scores.argsort(descending=True)
        return first(detections[best], self.max_detections)


def _fit_ellipses(confidence: np.ndarray, threshold: float) -> tuple[Tensor, Tensor]:
    """The flat indices of the centre pixels of all regions over `threshold`, and their scores."""
    mask = (confidence > threshold).astype(np.uint8)
    count, labels, stats, centroids = cv2.connectedComponentsWithStats(mask)
    pixels, scores = [], []
    for label in range(1, count):  # 0 is the background
        left, top, width, height = stats[label, :4]
        window = slice(top, top + height), slice(left, left + width)
        region = labels[window] == label
        x, y = _ellipse_center(region, centroids[label] - (left, top))
        pixels.append((top + y) * confidence.shape[1] + left + x)
        scores.append(confidence[window][region].max())
    return torch.tensor(pixels, dtype=torch.int64), torch.tensor(scores, dtype=torch.float32)


def _ellipse_center(region: np.ndarray, centroid: np.ndarray) -> tuple[int, int]:
    """Column and row at the centre of an ellipse around `region`, a mask cut out of the image.

    The centroid stands in for an ellipse that has less than five points or is centred outside.
    """
    contours, _ = cv2.findContours(
        region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    height, width = region.shape
    if len(contours[0]) >= 5:
        (x, y), _, _ = cv2.fitEllipse(contours[0])
        if 0 <= x <= width - 1 and 0 <= y <= height - 1:
            return round(x), round(y)
    return round(centroid[0]), round(centroid[1])


def _read_boxes(distances: Tensor, pixels: Tensor, scores: Tensor, index: int) -> Instances:
    """Instances of class `index` with the boxes (4, H, W) at flat indices of pixels, but for those
    that are empty or not finite."""
    height, width = distances.shape[1:]
    points = torch.stack([pixels % width, pixels // width], dim=1) + 0.5
    found = Instances(
        (height, width),
        pred_boxes=Boxes(boxes_of(points, distances.flatten(1)[:, pixels].t())),
        scores=scores,
        pred_classes=torch.full_like(pixels, index),
    )
    return found[found.pred_boxes.nonempty() & found.pred_boxes.tensor.isfinite().all(dim=1)]
