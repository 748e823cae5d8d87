"""Non-maximum suppression within classes: the usual one, IoU-guided NMS and Soft-NMS.

Shape letters: R boxes of one image, S kept ones. Boxes are XYXY in absolute pixels. `classes` are
integers; boxes of different classes never meet. A box or score that is not a number is never kept
and does nothing to others, nor does a box that is not finite. A box whose area is beyond float32,
1.8e19 pixels a side, has no IoU with others and suppresses none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor
from torchvision.ops import box_iou

# Where torchvision sets the classes side by side, coordinates stay below this many pixels: there
# float32 is exact to 1/128 pixel.
_LARGEST_OFFSET = 2**17
# So many of the best are compared at first where not all that are kept are wanted.
_FIRST_BOXES = 1000
# Pairs of boxes compared at a time: what stays in a CPU's cache, and some hundred MB on a GPU.
_CPU_PAIRS, _GPU_PAIRS = 2**17, 2**23
# Up to so many boxes on the CPU torchvision moves the classes apart; of more it takes one by one.
_MOVED_BY_TORCHVISION = 1000


def batched_nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """What torchvision's `batched_nms` keeps, where classes are never to meet.

    Torchvision moves the classes apart by offsets. At negative coordinates these are too short, for
    many or large classes float32 rounds them, and one NaN makes all of them NaN. Where none of this
    is so, the result is torchvision's to the last bit.

    Args:
        boxes: (R, 4); they and the scores are compared in float32.
        scores: (R,) what ranks the boxes; of equal ones the first comes first.
        classes: (R,).
        threshold: an IoU over it suppresses.

    Returns:
        (S,) int64 indices of the kept boxes by falling score; (0,) for no boxes.

    Raises:
        ValueError: the arguments are not as many as the boxes.
    """
    _check_shapes(boxes, scores=scores, classes=classes)
    if not len(boxes):
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    boxes, scores = boxes.float(), scores.float()
    # NaN is the lowest and the highest of what holds it.
    low, high, first, last, _, score = _extremes(boxes, classes, scores)
    if math.isnan(score) or not math.isfinite(high - low):
        usable = _usable(boxes, scores).nonzero().squeeze(1)
        return usable[batched_nms(boxes[usable], scores[usable], classes[usable], threshold)]

    room = high - min(low, 0.0) + 1  # that torchvision takes for each class
    if low < 0 and room <= _LARGEST_OFFSET:
        boxes = boxes - low
    if _has_room(room, first, last):
        return torchvision.ops.batched_nms(boxes, scores, classes, threshold)
    at_once = max(1, int(_LARGEST_OFFSET // room))
    return _nms_in_groups(boxes, scores, classes, threshold, at_once)


def best_of_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, max_kept: int
) -> Tensor:
    """The first `max_kept` of what `batched_nms` keeps of the same arguments; negative for all.

    A box suppresses none that is better, so that only so many of the best are compared as it takes
    to keep as many as asked for.
    """
    if max_kept < 0:
        return batched_nms(boxes, scores, classes, threshold)
    order = scores.sort(descending=True, stable=True).indices
    count = max(_FIRST_BOXES, 4 * max_kept)
    while True:
        best = order[:count]
        keep = best[batched_nms(boxes[best], scores[best], classes[best], threshold)]
        if len(keep) >= max_kept or len(best) == len(order):
            return keep[:max_kept]
        count *= 4


def compared_boxes(boxes: Tensor, classes: Tensor) -> Tensor | None:
    """Boxes (R, 4), finite and float32, as `batched_nms` rounds them on the CPU before it compares
    those of one class (R,); R is not 0. None where it takes the classes in groups."""
    low, high, first, last = (x.item() for value in (boxes, classes) for x in value.aminmax())
    if not _has_room(high - min(low, 0.0) + 1, first, last):
        return None
    if low < 0:
        boxes = boxes - low
    if len(boxes) > _MOVED_BY_TORCHVISION:
        return boxes
    return boxes + (classes.to(boxes) * (boxes.max() + 1))[:, None]


def _extremes(*values: Tensor) -> list[float]:
    """The lowest and the highest number of each. All in one tensor: one wait for a GPU."""
    return torch.stack([x.float() for value in values for x in value.aminmax()]).tolist()


def _has_room(room: float, first: float, last: float) -> bool:
    """Whether torchvision's offsets, `room` pixels a class, are exact enough for these classes."""
    return first >= 0 and (last + 1) * room <= _LARGEST_OFFSET


def _nms_in_groups(
    boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, at_once: int
) -> Tensor:
    """`batched_nms` of so many classes `at_once`; a single one is given no offset."""
    numbers = classes.unique(return_inverse=True)[1]
    groups = numbers // at_once
    kept = []
    for index in groups.argsort(stable=True).split(groups.bincount().tolist()):
        part = boxes[index], scores[index], numbers[index] % at_once
        kept.append(index[torchvision.ops.batched_nms(*part, threshold)])
    kept = torch.cat(kept).sort().values
    return kept[scores[kept].sort(descending=True, stable=True).indices]


# Boxes (R, 4), float32 and finite, by falling rank, their classes (R,) and a threshold -> (R,)
# int64: of a kept box its own index, of another that of the first kept box of its class that
# suppresses it, or R where none is found to: GPUs and the class offsets of `batched_nms` round
# differently.
Suppressors = Callable[[Tensor, Tensor, float], Tensor]


def first_suppressors(boxes: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """See Suppressors; what is kept is what `batched_nms` keeps. For any device."""
    falling = torch.arange(len(boxes), 0, -1, dtype=torch.float32, device=boxes.device)
    keep = batched_nms(boxes, falling, classes, threshold).sort().values
    left = torch.ones_like(classes, dtype=torch.bool)
    left[keep] = False
    left = left.nonzero().squeeze(1)
    first = torch.empty_like(classes, dtype=torch.int64)
    first[keep] = keep
    first[left] = _among_kept(boxes.t().contiguous(), classes, keep, left, threshold)
    return first


def iou_guided_nms(
    boxes: Tensor,
    cls_scores: Tensor,
    rank_scores: Tensor,
    classes: Tensor,
    threshold: float,
    suppressors: Suppressors = first_suppressors,
) -> tuple[Tensor, Tensor]:
    """IoU-guided NMS (arXiv 1807.11590, Algorithm 1).

    The box with the highest rank score is kept, and takes the highest class score of the boxes that
    it suppresses; and so on with the boxes that are left. Of equal rank scores the first comes
    first. What is kept is what `batched_nms` keeps.

    Args:
        boxes: (R, 4).
        cls_scores: (R,) class scores, which the kept boxes inherit.
        rank_scores: (R,) what ranks the boxes, such as the predicted IoU.
        classes: (R,).
        threshold: an IoU over it suppresses.
        suppressors: what finds out who suppresses whom.

    Returns:
        keep: (S,) indices of the kept boxes by falling rank score; (0,) for no boxes.
        scores: (S,) their new class scores.

    Raises:
        ValueError: the arguments are not as many as the boxes.
    """
    _check_shapes(boxes, cls_scores=cls_scores, rank_scores=rank_scores, classes=classes)
    # One number tells whether all are; it is quicker than the masks, and where it is too large for
    # its type they decide.
    if not math.isfinite(boxes.sum() + cls_scores.sum() + rank_scores.sum()):
        usable = _usable(boxes, cls_scores, rank_scores)
        if not usable.all():
            index = usable.nonzero().squeeze(1)
            others = (x[index] for x in (boxes, cls_scores, rank_scores, classes))
            keep, scores = iou_guided_nms(*others, threshold, suppressors)
            return index[keep], scores
    # In this order the first suppressor is the one of the lowest index, and ties are settled.
    order = rank_scores.sort(descending=True, stable=True).indices
    cls_scores = cls_scores[order]
    first = suppressors(boxes[order].float(), classes[order], threshold)
    keep = (first == torch.arange(len(first), device=first.device)).nonzero().squeeze(1)
    scores = cls_scores.new_full((len(first) + 1,), -math.inf)  # the last of those with nobody
    scores.scatter_reduce_(0, first, cls_scores, "amax")
    return order[keep], scores[keep]


def _among_kept(
    sides: Tensor, classes: Tensor, keep: Tensor, left: Tensor, threshold: float
) -> Tensor:
    """For each box in `left`, the first box in `keep` of its class with an IoU over `threshold`.

    `sides` is (4, R), twice as quick to compare as boxes that lie side by side. `keep` and `left`
    are rising indices. R stands where no IoU is over the threshold.
    """
    first = torch.full_like(classes, len(classes), dtype=torch.int64)
    keep = keep[classes[keep].sort(stable=True).indices]
    open_ = left[classes[left].sort(stable=True).indices]  # those without a suppressor yet
    limit = _round_down(threshold, sides.dtype)
    pairs = _GPU_PAIRS if sides.is_cuda else _CPU_PAIRS

    while len(keep) and len(open_):
        size = max(1, pairs // len(open_))
        rows, keep = keep[:size], keep[size:]
        # Both are sorted by class, so that the partners of these rows lie side by side.
        ends = torch.stack([classes[rows[0]], classes[rows[-1]] + 1])
        begin, end = torch.searchsorted(classes[open_], ends).tolist()
        columns = open_[begin:end]
        suppresses = _iou(sides[:, rows, None], sides[:, columns]) > limit
        if ends[1] - ends[0] > 1:
            suppresses &= classes[rows][:, None] == classes[columns]
        found, row = suppresses.max(dim=0)  # the first of equal values
        first[columns[found]] = rows[row[found]]
        open_ = torch.cat([columns[~found], open_[end:]])
    return first[left]


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    method: str,
    *,
    threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 0.001,
    max_kept: int = -1,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS (arXiv 1704.04503): boxes that overlap a better one lose score instead of vanishing.

    Torchvision has none, and OpenCV's `softNMSBoxes` rounds boxes to whole pixels and knows no
    classes.

    Args:
        boxes: (R, 4).
        scores: (R,) in [0, 1].
        classes: (R,).
        method: "linear": times 1 - IoU where the IoU is over `threshold`; "gaussian": times
            exp(-IoU^2 / sigma).
        threshold, sigma: see `method`; the values of the paper.
        min_score: boxes that fall to it or below are dropped.
        max_kept: stop after so many; negative for all.

    Returns:
        keep: (S,) indices by falling new score; (0,) for no boxes.
        scores: (S,) their new scores.

    Raises:
        ValueError: another method, or the arguments are not as many as the boxes.
    """
    if method not in ("linear", "gaussian"):
        raise ValueError(f"The method of Soft-NMS is 'linear' or 'gaussian', not {method!r}.")
    _check_shapes(boxes, scores=scores, classes=classes)
    # A score of 0 is never picked and boxes without a place overlap nothing.
    scores = scores.where(_usable(boxes, scores), 0)
    boxes = boxes.float()
    final = torch.zeros_like(scores)
    picks = []
    for _ in range(len(scores) if max_kept < 0 else min(max_kept, len(scores))):
        pick = scores.argmax()
        if not scores[pick] > min_score:
            break
        picks.append(pick)
        final[pick] = scores[pick]
        iou = box_iou(boxes[pick, None], boxes).squeeze(0).nan_to_num(0.0)
        if method == "linear":
            factor = torch.where(iou > threshold, 1 - iou, 1.0)
        else:
            factor = torch.exp(-iou.square() / sigma)
        scores *= torch.where(classes == classes[pick], factor.to(scores), 1.0)
        scores[pick] = 0
    keep = torch.stack(picks) if picks else classes.new_zeros(0, dtype=torch.int64)
    return keep, final[keep]


def _iou(sides1: Tensor, sides2: Tensor) -> Tensor:
    """(4, A, 1), (4, B) -> (A, B), rounded as in torchvision's `nms`."""
    x1, y1, x2, y2 = sides1
    u1, v1, u2, v2 = sides2
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp_(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp_(min=0)
    inner = width.mul_(height)
    union = ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1)).sub_(inner)
    return inner.div_(union)


def _usable(boxes: Tensor, *scores: Tensor) -> Tensor:
    """(R,) whether a box is finite and its scores are numbers."""
    usable = boxes.isfinite().all(dim=1)
    for score in scores:
        usable &= ~score.isnan()
    return usable


def _round_down(value: float, dtype: torch.dtype) -> Tensor:
    """The largest number of `dtype` that is not over `value`; torchvision compares in float64."""
    rounded = torch.tensor(value, dtype=dtype)
    return rounded if rounded.item() <= value else rounded.nextafter(rounded.new_tensor(-1.0))


def _check_shapes(boxes: Tensor, **others: Tensor) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"Boxes are (R, 4), not {tuple(boxes.shape)}.")
    for name, value in others.items():
        if value.shape != boxes.shape[:1]:
            raise ValueError(
                f"For {len(boxes)} boxes {name} is ({len(boxes)},), not {tuple(value.shape)}."
            )
