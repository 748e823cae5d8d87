"""Box maths on tensors.

Boxes are (..., 4) XYXY in absolute pixels: x1, y1, x2, y2. Points are (..., 2): x, y. Distances are
those from a point to the left, top, right and bottom of its box. Nothing here knows of models or
configs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def aligned_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU of each box with the box at the same place of the other tensor.

    Whole numbers and half precision are computed in float32. Differentiable in both arguments:
    where boxes touch and where a box has no width, the gradient is that of boxes that overlap and
    of a box that opens; where two sides are equal, each has half of it.

    Args:
        boxes1, boxes2: (R, 4) XYXY.

    Returns:
        (R,) in [0, 1]; (0,) for no boxes. 0 where the union has no area: two boxes without area or
        inverted ones, of which a negative side counts as 0. NaN where a box is not finite or where
        an area is beyond the dtype, in float32 that of a square of 1.8e19 pixels a side.

    Raises:
        ValueError: the shapes differ or do not end in 4.
    """
    if boxes1.shape != boxes2.shape or boxes1.shape[-1] != 4:
        raise ValueError(
            f"aligned_iou takes two tensors of boxes of one shape (R, 4), not "
            f"{tuple(boxes1.shape)} and {tuple(boxes2.shape)}."
        )
    boxes1, boxes2 = _at_least_float32(boxes1), _at_least_float32(boxes2)
    top_left = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    bottom_right = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    intersection = _not_negative(bottom_right - top_left).prod(dim=-1)
    union = _area(boxes1) + _area(boxes2) - intersection
    # Without the choice, which lets no gradient through, that of two lines would be infinite. NaN
    # is not 0 and stays.
    tiny = torch.finfo(union.dtype).tiny
    iou = intersection / torch.where(union < tiny, tiny, union)
    return torch.where(union == 0, torch.zeros_like(iou), iou)


def boxes_around(points: Tensor, distances: Tensor) -> Tensor:
    """Points (..., 2) and distances (..., 4) to the sides -> boxes (..., 4)."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """How near points (P, 2) are to the middle of their boxes (P, 4), arXiv 1904.01355,
    Eqn. 3: (P,) in [0, 1]."""
    before, after = points - boxes[:, :2], boxes[:, 2:] - points  # (P, 2), in x and in y
    nearer, farther = torch.minimum(before, after), torch.maximum(before, after)
    return (nearer.clamp(min=0) / farther).prod(dim=1).sqrt()


def _area(boxes: Tensor) -> Tensor:
    return _not_negative(boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)


def _not_negative(lengths: Tensor) -> Tensor:
    """`lengths.clamp(min=0)` through which a 0 has the gradient 1: that of `clamp` is another one
    in torch 2.14."""
    return torch.where(lengths < 0, 0, lengths)


def _at_least_float32(boxes: Tensor) -> Tensor:
    return boxes.to(torch.promote_types(boxes.dtype, torch.float32))
