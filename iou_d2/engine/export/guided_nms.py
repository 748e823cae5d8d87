"""The NMS of IoU-Net as a graph, for the boxes of all images in one tensor.

Shape letters: R boxes of all images, S kept ones. Boxes are XYXY in pixels; those of different
groups, each a class of an image, never meet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from .candidates import suppress


def plain_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """`batched_nms`: indices (S,) of the kept boxes by falling score, and their scores (S,).
    Arguments as of `guided_nms`."""
    order, kept = _ranked_nms(boxes, scores, groups, num_groups, threshold)
    keep = order[torch.nonzero(kept).squeeze(1)]
    return keep, scores[keep]


def guided_nms(
    boxes: Tensor,
    cls_scores: Tensor,
    rank_scores: Tensor,
    groups: Tensor,
    num_groups: int,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """`iou_guided_nms` (arXiv 1807.11590, Algorithm 1) by a matrix of kept and other boxes.

    Args:
        boxes: (R, 4) finite; R may be 0.
        cls_scores: (R,) class scores, which the kept boxes inherit.
        rank_scores: (R,) what ranks the boxes; where it is no number there is no box.
        groups: (R,) int64, 0..num_groups - 1.
        threshold: an IoU over it suppresses.

    Returns:
        keep: (S,) indices of the kept boxes by falling rank score, the first of equal ones first.
        scores: (S,) their new class scores.
    """
    order, kept = _ranked_nms(boxes, rank_scores, groups, num_groups, threshold)
    boxes, cls_scores, groups = boxes[order], cls_scores[order], groups[order]
    keep = torch.nonzero(kept).squeeze(1)
    # In float64, as torchvision compares.
    hit = box_iou(boxes[keep], boxes).double() > threshold
    hit = hit & (groups[keep][:, None] == groups) & ~kept & ~rank_scores[order].isnan()
    numbers = torch.arange(keep.shape[0], device=keep.device)[:, None]
    none = torch.ones_like(groups)[None] * keep.shape[0]
    first = torch.cat([torch.where(hit, numbers, none), none]).amin(dim=0)
    own = keep[:, None] == torch.arange(order.shape[0], device=keep.device)
    member = own | (first == numbers)
    # One column more, for the highest of none.
    inherited = torch.where(member, cls_scores, torch.full_like(cls_scores, -torch.inf))
    return order[keep], F.pad(inherited, (0, 1), value=-torch.inf).amax(dim=1)


def _ranked_nms(
    boxes: Tensor, ranks: Tensor, groups: Tensor, num_groups: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """The order (R,) of boxes by falling rank, and whether each in this order is kept (R,)."""
    order = _falling(ranks)
    there = ~ranks[order].isnan()
    falling = torch.arange(order.shape[0], 0, -1, device=order.device).to(boxes.dtype)
    # One box more, which is none: there are operators that want some.
    kept = suppress(
        F.pad(boxes[order], (0, 0, 0, 1))[None],
        F.pad(falling * there, (0, 1))[None],
        F.pad(groups[order], (0, 1))[None],
        num_groups,
        threshold,
    )
    return order, kept[0, :-1] > 0


def _falling(ranks: Tensor) -> Tensor:
    """(R,) indices by falling rank, the first of equal ones first; what is no number comes last."""
    ranks = torch.where(ranks.isnan(), torch.full_like(ranks, -torch.inf), ranks)
    if torch.onnx.is_in_onnx_export():  # which knows no stable sort, but its TopK is one
        return ranks.topk(ranks.shape[0]).indices
    return ranks.sort(descending=True, stable=True).indices
