"""How the predictions of SSD and RefineDet are read for all images of a batch at once.

Shape letters: N images, K classes, R default boxes of all levels, M candidates of an image: the
best `topk` of each class, class by class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iou_d2.detectors.multibox_detector import MultiBoxDetector

from .candidates import Candidates, clipped, suppress, top
from .reader import Reader, as_one_image, number_of_images


class MultiBoxReader(Reader):
    """Of a MultiBoxDetector: what `rank` and `boxes` say."""

    def __init__(self, detector: MultiBoxDetector):
        self.detector = detector
        self.nms = detector.nms

    def raw(self, predictions: Any, size: tuple[int, int]) -> dict[str, Tensor]:
        count, flat = number_of_images(predictions), as_one_image(predictions)
        read = {
            "boxes": self.detector.boxes(flat, 0, slice(None)),
            **self.detector.rank(flat, 0),
        }
        return {name: x.reshape(count, -1, x.shape[1]) for name, x in read.items()}

    def candidates(self, predictions: Any, size: tuple[int, int]) -> Candidates:
        raw = self.raw(predictions, size)
        boxes = raw.pop("boxes")
        count, _, classes = raw["scores"].shape
        by_class = {name: x.transpose(1, 2).flatten(0, 1) for name, x in raw.items()}  # (NK, R)
        scores = by_class.pop("scores")
        scores = torch.where(scores > self.nms.score_threshold, scores, 0.0)
        scores, index = top(scores, self.nms.topk)
        fields = {name: x.gather(1, index).view(count, -1) for name, x in by_class.items()}
        index = index.view(count, -1)
        found = Candidates(
            boxes.gather(1, index[..., None].expand(-1, -1, 4)),
            scores.view(count, -1),
            torch.arange(classes).repeat_interleave(self.nms.topk).expand(count, -1),
            fields,
        )
        return clipped(found, size) if self.detector.clip_before_nms else found

    def kept(self, candidates: Candidates, num_classes: int) -> Tensor:
        """As that of Reader. Classes never meet, so each of them is an image of its own."""
        scores = candidates.scores.view(-1, self.nms.topk)  # (NK, topk)
        boxes = candidates.boxes.view(-1, self.nms.topk, 4)
        groups = torch.zeros_like(scores, dtype=torch.int64)
        kept = suppress(boxes, scores, groups, 1, self.nms.nms_threshold)
        return kept.view(candidates.scores.shape)
