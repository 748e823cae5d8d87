"""The kinds of NMS between which IoU-Net chooses.

Shape letters: R candidates of one image, S kept ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from detectron2.structures import Instances
from torch import Tensor

from iou_d2.layers.suppressors import first_suppressors
from iou_d2.ops.nms import batched_nms, iou_guided_nms, soft_nms
from iou_d2.ops.rivals import needs_rank

from .dense import part_named

# (class scores, predicted IoUs), each (R,), -> (R,): what ranks candidates in IoU-guided NMS.
Ranking = Callable[[Tensor, Tensor], Tensor]


def rank_by_iou(scores: Tensor, ious: Tensor) -> Tensor:
    """Algorithm 1."""
    return ious


def rank_by_product(scores: Tensor, ious: Tensor) -> Tensor:
    return scores * ious.clamp(min=0)


class NMS(Protocol):
    """Which candidates of one image are kept, and their new scores."""

    # Whether candidates must have `pred_ious`; then there is `needs_iou`, see GuidedNMS.
    needs_ious: bool

    def __call__(self, candidates: Instances) -> tuple[Tensor, Tensor]:
        """R candidates -> the indices (S,) of the kept ones in any order, their scores (S,)."""


@dataclass(frozen=True)
class PlainNMS:
    """By class score; an IoU over `threshold` suppresses."""

    threshold: float
    needs_ious = False

    def __call__(self, candidates: Instances) -> tuple[Tensor, Tensor]:
        boxes, scores = candidates.pred_boxes.tensor, candidates.scores
        keep = batched_nms(boxes, scores, candidates.pred_classes, self.threshold)
        return keep, scores[keep]


@dataclass(frozen=True)
class GuidedNMS:
    """IoU-guided NMS by the rank of `ranking`, or of class scores where it is None."""

    threshold: float
    ranking: Ranking | None = rank_by_iou

    @property
    def needs_ious(self) -> bool:
        return self.ranking is not None

    def __call__(self, candidates: Instances) -> tuple[Tensor, Tensor]:
        scores = ranks = candidates.scores
        if self.ranking is not None:
            ranks = self.ranking(scores, candidates.pred_ious)
        boxes, classes = candidates.pred_boxes.tensor, candidates.pred_classes
        return iou_guided_nms(boxes, scores, ranks, classes, self.threshold, first_suppressors)

    def needs_iou(self, candidates: Instances, limit: int) -> Tensor:
        """(R,) bool: the candidates whose `pred_ious` must be known where the best `limit` of those
        that are kept go on; what the others have there changes nothing."""
        boxes, classes = candidates.pred_boxes.tensor, candidates.pred_classes
        return needs_rank(boxes, candidates.scores, classes, self.threshold, limit)


@dataclass(frozen=True)
class SoftNMS:
    """Soft-NMS, "linear" over `threshold` or "gaussian": see `soft_nms`.

    It lowers class scores or, with `times_iou`, their products with the predicted IoUs, so that of
    rivals the one with the highest product keeps it.
    """

    method: str
    threshold: float
    times_iou: bool = False

    @property
    def needs_ious(self) -> bool:
        return self.times_iou

    def __call__(self, candidates: Instances) -> tuple[Tensor, Tensor]:
        scores = candidates.scores
        if self.times_iou:
            scores = scores * candidates.pred_ious.clamp(0, 1)
        boxes, classes = candidates.pred_boxes.tensor, candidates.pred_classes
        return soft_nms(boxes, scores, classes, self.method, threshold=self.threshold)

    def needs_iou(self, candidates: Instances, limit: int) -> Tensor:
        """(R,) bool, see GuidedNMS: that of each, since each lowers others."""
        return torch.ones_like(candidates.scores, dtype=torch.bool)


def build_nms(cfg) -> NMS:
    """The NMS that MODEL.IOU_NET.NMS names."""
    node, threshold = cfg.MODEL.IOU_NET, cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST
    rankings = {"iou": rank_by_iou, "score": None, "product": rank_by_product}
    ranking = part_named(rankings, node.RANK_BY, "MODEL.IOU_NET.RANK_BY")
    softened = {"score": False, "product": True}
    times_iou = part_named(softened, node.SOFT_NMS_BY, "MODEL.IOU_NET.SOFT_NMS_BY")
    parts = {
        "plain": PlainNMS(threshold),
        "guided": GuidedNMS(threshold, ranking),
        "soft_linear": SoftNMS("linear", threshold, times_iou),
        "soft_gaussian": SoftNMS("gaussian", threshold, times_iou),
    }
    return part_named(parts, node.NMS, "MODEL.IOU_NET.NMS")
