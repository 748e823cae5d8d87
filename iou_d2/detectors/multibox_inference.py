"""From the class scores of SSD and RefineDet to detections.

Shape letters: K classes, R default boxes of all levels, S candidates of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from iou_d2.ops.nms import soft_nms

from .dense import DenseNMS, build_dense_nms, first, part_named


@dataclass(frozen=True)
class SoftNMS:
    """Soft-NMS in the place of DenseNMS: boxes that overlap a better one of their class lose score.

    Args:
        score_threshold, topk, max_detections: as those of DenseNMS.
        nms_threshold: an IoU over it takes from the score: "linear" only.
        method: "linear" or "gaussian".
    """

    score_threshold: float
    topk: int
    nms_threshold: float
    max_detections: int
    method: str = "linear"

    def __call__(self, levels: Sequence[Instances]) -> Instances:
        candidates = Instances.cat(list(levels))
        keep, scores = soft_nms(
            candidates.pred_boxes.tensor,
            candidates.scores,
            candidates.pred_classes,
            self.method,
            threshold=self.nms_threshold,
            max_kept=self.max_detections,
        )
        kept = candidates[keep]
        kept.scores = scores
        return first(kept, self.max_detections)


def build_multibox_nms(cfg) -> DenseNMS | SoftNMS:
    """What MODEL.MULTIBOX.NMS names, with the test keys that all dense detectors share."""
    hard = build_dense_nms(cfg)
    soft = (hard.score_threshold, hard.topk, hard.nms_threshold, hard.max_detections)
    parts = {
        "hard": hard,
        "soft_linear": SoftNMS(*soft, method="linear"),
        "soft_gaussian": SoftNMS(*soft, method="gaussian"),
    }
    return part_named(parts, cfg.MODEL.MULTIBOX.NMS, "MODEL.MULTIBOX.NMS")


class ClassCandidates(NamedTuple):
    """The entries (S,) of a score matrix that go on to NMS."""

    anchors: Tensor
    classes: Tensor


def best_of_classes(scores: Tensor, threshold: float, topk: int) -> ClassCandidates:
    """Of `scores` (R, K) the `topk` highest of each class that are above `threshold`."""
    best, anchors = scores.topk(min(topk, len(scores)), dim=0)
    rows, classes = torch.nonzero(best > threshold, as_tuple=True)
    return ClassCandidates(anchors[rows, classes], classes)


def candidates_of(
    ranked: Mapping[str, Tensor],
    boxes: Callable[[Tensor], Tensor],
    nms: DenseNMS | SoftNMS,
    image_size: tuple[int, int],
    clip: bool,
) -> Instances:
    """What an image sends to `nms`: the best boxes of each class.

    Args:
        ranked: "scores" (R, K) and whatever else (R, K) detections carry.
        boxes: the index (S,) of some of the R boxes -> what they predict, (S, 4).
        clip: cut the boxes at the image.
    """
    chosen = best_of_classes(ranked["scores"], nms.score_threshold, nms.topk)
    found = boxes(chosen.anchors)
    if clip:
        found = clip_boxes_to_image(found, image_size)
    fields = {name: value[chosen.anchors, chosen.classes] for name, value in ranked.items()}
    return Instances(image_size, pred_boxes=Boxes(found), pred_classes=chosen.classes, **fields)


def class_scores(logits: Tensor) -> Tensor:
    """Logits (..., K + 1) -> probabilities (..., K) of the classes without the background."""
    return logits.float().softmax(dim=-1)[..., :-1]
