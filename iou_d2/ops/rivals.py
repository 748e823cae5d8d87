"""Whose rank matters in guided NMS, where only the boxes of the best class scores go on.

A box is a rival of another one of its class where the IoU of the two might be over the threshold.
Rivals of rivals are one group. What NMS keeps of a group depends on that group alone, and the best
of what it keeps has the highest class score of the group, for whoever suppresses a box takes its
score (arXiv 1807.11590, Algorithm 1).

Shape letters: R boxes of one image, E pairs of rivals.
"""

from __future__ import annotations

import torch
from torch import Tensor

# NMS lays classes side by side, where float32 rounds a coordinate by up to 2^-8 pixels; this is
# twice as much.
_BLUR = 2**-7
# Boxes that are compared with all others at a time.
_ROWS = 128
# Of more boxes there may be too many pairs.
_MOST_BOXES = 4096


def needs_rank(
    boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, limit: int
) -> Tensor:
    """(R,) bool: the boxes whose rank changes which boxes guided NMS gives, or their order.

    A box without a rival is kept whatever its rank is, and a group does not matter where `limit`
    others have a better score. Ranks still settle the order of equal scores.

    Args:
        boxes: (R, 4).
        scores: (R,) class scores.
        classes: (R,).
        threshold: of NMS.
        limit: boxes that go on after NMS, those of the highest score; negative for all.
    """
    finite = boxes.isfinite().all() and scores.isfinite().all()
    if not 0 < len(boxes) <= _MOST_BOXES or threshold < 0 or not finite:
        return torch.ones_like(classes, dtype=torch.bool)
    first, second = _rivals(boxes.float(), classes, threshold)
    _, number, times = scores.unique(return_inverse=True, return_counts=True)
    matters = times[number] > 1
    matters[first] = True
    if not 0 <= limit < len(boxes):
        return matters
    group = _groups(first, second, len(boxes))
    best = scores.new_full(scores.shape, -torch.inf).scatter_reduce(0, group, scores, "amax")
    last = best.sort(descending=True).values[max(limit, 1) - 1]
    return matters & (best[group] >= last)


def _rivals(boxes: Tensor, classes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """(E,) and (E,) indices of the pairs, both ways."""
    sides = boxes.t().contiguous()
    index, found = torch.arange(len(boxes), device=boxes.device), []
    for rows in index.split(_ROWS):
        pairs = _may_overlap(sides[:, rows, None], sides, threshold)
        pairs &= (classes[rows, None] == classes) & (rows[:, None] != index)
        row, column = pairs.nonzero(as_tuple=True)
        found.append((rows[row], column))
    return tuple(map(torch.cat, zip(*found)))


def _may_overlap(sides1: Tensor, sides2: Tensor, threshold: float) -> Tensor:
    """(4, A, 1), (4, B) -> (A, B) bool: whether the IoU is over `threshold`, or might be where
    sides are rounded."""
    x1, y1, x2, y2 = sides1
    u1, v1, u2, v2 = sides2
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).add_(2 * _BLUR).clamp_(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).add_(2 * _BLUR).clamp_(min=0)
    inner = width.mul_(height)
    least1, least2 = (
        (a2 - a1 - 2 * _BLUR).clamp_(min=0) * (b2 - b1 - 2 * _BLUR).clamp_(min=0)
        for a1, b1, a2, b2 in (sides1, sides2)
    )
    union = (least1 + least2).sub_(inner)
    return inner > union.mul_(threshold * (1 - 1e-5))


def _groups(first: Tensor, second: Tensor, count: int) -> Tensor:
    """(E,) and (E,) indices of rivals, both ways -> (count,) int64, one number for each group."""
    group = torch.arange(count, device=first.device)
    while True:
        lower = group.scatter_reduce(0, first, group[second], "amin")
        lower = lower[lower]
        if torch.equal(lower, group):
            return group
        group = lower
