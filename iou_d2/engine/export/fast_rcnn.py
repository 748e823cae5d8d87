"""From what a box head says of proposals to detections: thresholds and NMS as in Detectron2.

Shape letters: N images, P proposals of an image, K classes, C the boxes of a proposal: K, or 1
where one serves all classes.
"""

from __future__ import annotations

import torch
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, ROIHeads
from torch import Tensor

from iou_d2.detectors.faster_rcnn import BoxLossOutputLayers

from .box_heads import Regions, Regressed, box_parts_of
from .candidates import Candidates, best, clip, is_finite, suppress
from .pooling import Pooling


def candidates_of(
    regressed: Regressed, regions: Regions, there: Tensor, threshold: float
) -> Candidates:
    """What NMS is given: each box once a class, cut at the edges, those of class 0 first.

    Args:
        regressed: of N * P `regions`.
        there: (N, P), whether there is such a proposal.
        threshold: a score at most that is 0.

    Returns:
        Candidates of which there are KP for an image.
    """
    count, length = there.shape
    boxes, scores = regressed.boxes, regressed.probabilities[:, :-1]
    finite = is_finite(boxes).flatten(1).all(dim=1)
    finite = finite & is_finite(regressed.probabilities).all(dim=1)
    boxes = clip(torch.where(finite[:, None, None], boxes, 0.0), regions.size)
    usable = (finite & there.reshape(-1))[:, None] & (scores > threshold)
    scores = torch.where(usable, scores, 0.0)
    classes = scores.shape[1]
    boxes = boxes.view(count, length, -1, 4).transpose(1, 2).expand(-1, classes, -1, -1)
    scores = scores.view(count, length, classes).transpose(1, 2)
    numbers = torch.arange(classes)[:, None].expand(-1, length).reshape(-1)
    return Candidates(
        boxes.reshape(count, -1, 4), scores.reshape(count, -1), numbers.expand(count, -1), {}
    )


def with_sides(candidates: Candidates, min_side: float) -> Candidates:
    """Those of whose box both sides are at least `min_side` pixels; the others are made none."""
    sides = candidates.boxes[..., 2:] - candidates.boxes[..., :2]
    large = (sides >= min_side).all(dim=-1)
    return candidates._replace(scores=torch.where(large, candidates.scores, 0.0))


class FastRCNN:
    """What FastRCNNOutputLayers and BoxLossOutputLayers do at test time."""

    score = "class probability"
    doubtful = 0.0

    def __init__(self, heads: ROIHeads):
        predictor: FastRCNNOutputLayers = box_parts_of(heads).predictors[-1]
        self.num_classes = heads.num_classes
        self.threshold = predictor.test_score_thresh
        self.nms_threshold = predictor.test_nms_thresh
        self.max_detections = predictor.test_topk_per_image
        has_min_size = isinstance(predictor, BoxLossOutputLayers)
        self.min_side = predictor.min_size_test if has_min_size else 0.0

    def candidates(
        self,
        regressed: Regressed,
        regions: Regions,
        there: Tensor,
        pooling: Pooling,
    ) -> Candidates:
        """What NMS is given, see `candidates_of`."""
        found = candidates_of(regressed, regions, there, self.threshold)
        return with_sides(found, self.min_side) if self.min_side > 0 else found

    def detect(self, candidates: Candidates, size: tuple[int, int], pooling: Pooling) -> Candidates:
        """The best that NMS leaves, best first."""
        limit = self.max_detections
        limit = candidates.scores.shape[1] if limit < 0 else limit
        kept = suppress_by_class(
            candidates.boxes, candidates.scores, self.num_classes, self.nms_threshold
        )
        return best(candidates._replace(scores=candidates.scores * kept), limit)


def suppress_by_class(boxes: Tensor, scores: Tensor, num_classes: int, threshold: float) -> Tensor:
    """`suppress` within classes, of which each has as many boxes (N, KP, 4), one class after
    another: (N, KP), 1 where a box is kept. Each class is given as an image, so that ONNX's
    operator does not look at all boxes for each of them."""
    count = scores.shape[1] // num_classes
    boxes, by_class = boxes.reshape(-1, count, 4), scores.reshape(-1, count)
    groups = torch.zeros_like(by_class, dtype=torch.int64)
    return suppress(boxes, by_class, groups, 1, threshold).view_as(scores)
