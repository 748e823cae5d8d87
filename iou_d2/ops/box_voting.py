"""Box voting: boxes that overlap a better one move it in place of vanishing.

Shape letters: R boxes of one image, S resulting ones. Boxes are XYXY.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou


def vote_boxes(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    threshold: float,
    min_soft_score: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Box voting as RefineDet's authors merge the scales of an image (their test.py).

    The best box and those of its class that overlap it become one: the mean of their corners with
    their scores as weights, with the best score; and so on with the boxes that are left.

    Args:
        boxes: (R, 4). Those that are not finite, or whose score is no number, are left out.
        scores: (R,), at least 0; of equal ones the first comes first.
        classes: (R,); boxes of different ones never meet.
        threshold: an IoU that reaches it overlaps.
        min_soft_score: keep, beside the mean, the boxes that went into it as they were, with their
            scores times 1 - IoU, where that reaches this. None keeps none of them.

    Returns:
        index: (S,) int64, of the best box of a mean, or of the box itself, by falling new score.
        boxes: (S, 4), the means in the dtype of `boxes`.
        scores: (S,). No boxes give empty results.
    """
    usable = boxes.isfinite().all(dim=1) & ~scores.isnan()
    left = usable.nonzero().squeeze(1)
    left = left[scores[left].sort(descending=True, stable=True).indices]
    found = [(left[:0], boxes[:0], scores[:0])]
    while len(left):
        best = left[:1]
        iou = box_iou(boxes[best].double(), boxes[left].double())[0]
        joins = (iou >= threshold) & (classes[left] == classes[best])
        joins[0] = True  # a box without area has no IoU with itself
        members, iou, left = left[joins], iou[joins], left[~joins]
        found.append((best, _mean(boxes[members], scores[members]), scores[best]))
        if min_soft_score is not None and len(members) > 1:
            softer = scores[members] * (1 - iou).to(scores)
            stays = softer >= min_soft_score
            found.append((members[stays], boxes[members[stays]], softer[stays]))
    index, voted, scores = (torch.cat(x) for x in zip(*found))
    order = scores.sort(descending=True, stable=True).indices
    return index[order], voted[order], scores[order]


def _mean(boxes: Tensor, scores: Tensor) -> Tensor:
    """(R, 4) and (R,) -> (1, 4); a single box to the last bit, and the plain mean of boxes that all
    have a score of 0."""
    if len(boxes) == 1:
        return boxes
    weights = scores.double()
    weights = weights if weights.sum() > 0 else torch.ones_like(weights)
    mean = (boxes.double() * weights[:, None]).sum(dim=0, keepdim=True) / weights.sum()
    return mean.to(boxes)
