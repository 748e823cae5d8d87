"""Two sets of detections, compared."""

from __future__ import annotations

import torch
from detectron2.structures import Instances
from torch import Tensor


def paired(found: Instances, boxes: Tensor, scores: Tensor, classes: Tensor) -> Tensor:
    """For each of S detections the index (S,) of the same one of others, which must be as many:
    boxes within 0.05 px, scores within 1e-4. Their order does not count where scores are equal."""
    assert len(found) == len(scores)
    near = (found.pred_boxes.tensor[:, None] - boxes).abs().amax(dim=2) <= 0.05
    near &= (found.scores[:, None] - scores).abs() <= 1e-4
    near &= found.pred_classes[:, None] == classes
    assert near.any(dim=1).all(), "a detection is not among the others"
    assert near.any(dim=0).all(), "one of the others was not found"
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
    return near.int().argmax(dim=1)
