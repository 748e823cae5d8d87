"""Which ground truth each point of a dense detector learns: ATSS and FCOS.

Shape letters: L levels, R points of all levels, R_l of one, G ground-truth boxes, C candidates of a
ground truth, P points of a chunk. Points are (x, y), boxes XYXY, in absolute pixels of the network
input. An assigner returns for each point the index of its ground truth, -1 for background. Half
precision is computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .boxes import aligned_iou

# Pairs of a point and a box that FCOS takes at a time: some hundred MB on a GPU. On a CPU they stay
# in the cache, and are too few for torch to split: it would wait for busy cores at every step.
_CPU_PAIRS, _GPU_PAIRS = 2**15, 2**23


@dataclass(frozen=True)
class ATSSAssigner:
    """Adaptive Training Sample Selection (arXiv 1912.02424, algorithm 1).

    On every level the `topk` points nearest to the centre of a ground truth are its candidates. A
    candidate is positive if it lies inside the ground truth and the IoU of its anchor reaches the
    mean plus the standard deviation (over C - 1) of all its candidates' IoUs. A point claimed by
    several goes to the one of highest IoU, the first at equal IoU. Of points equally near, torch's
    top-k chooses, on the CPU as in mmdetection. The deviation of a single candidate is 0.

    Holds the distances of a level, G * R_l numbers.

    Args:
        topk: candidates a level, fewer where a level has fewer points.
        anchor_scale: side, in strides, of the square anchor centred on each point.
    """

    topk: int = 9
    anchor_scale: float = 8.0

    def __post_init__(self) -> None:
        if self.topk < 1:
            raise ValueError(f"ATSS needs at least 1 candidate a level, not topk={self.topk}.")

    def __call__(
        self, points: Sequence[Tensor], strides: Sequence[int], gt_boxes: Tensor
    ) -> Tensor:
        """Assign the points of one image.

        Args:
            points: L tensors (R_l, 2), in any order.
            strides: pixels of a cell of each level.
            gt_boxes: (G, 4). One without area, inverted, or not finite takes no point.

        Returns:
            (R,) int64 in [-1, G), in the order of the levels; all -1 without ground truth.

        Raises:
            ValueError: a level without stride, or boxes that are not (G, 4).
        """
        points, gt_boxes = _checked(points, strides, gt_boxes)
        everywhere = torch.cat(points)
        if len(everywhere) == 0 or len(gt_boxes) == 0:
            return everywhere.new_full((len(everywhere),), -1, dtype=torch.int64)
        candidates, anchors = self._candidates(points, strides, gt_boxes)
        ious = aligned_iou(anchors, gt_boxes[:, None].expand_as(anchors))
        sides = _side_distances(everywhere[candidates], gt_boxes[:, None])
        inside = reduce(torch.minimum, sides) > 0.01
        positive = inside & (ious >= _adaptive_threshold(ious))
        gt_index, column = torch.nonzero(positive, as_tuple=True)
        return _highest_claim(
            candidates[gt_index, column], gt_index, ious[gt_index, column], len(everywhere)
        )

    def _candidates(
        self, points: Sequence[Tensor], strides: Sequence[int], gt_boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Index (G, C) of each candidate into all points, and its anchor (G, C, 4)."""
        centers = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
        start, indices, anchors = 0, [], []
        for level, stride in zip(points, strides):
            # Matrix products would round: of points equally near, others would be chosen.
            distance = torch.cdist(centers, level, compute_mode="donot_use_mm_for_euclid_dist")
            nearest = distance.topk(min(self.topk, len(level)), largest=False).indices
            half_side = self.anchor_scale * stride / 2
            chosen = level[nearest]
            indices.append(nearest + start)
            anchors.append(torch.cat([chosen - half_side, chosen + half_side], dim=-1))
            start += len(level)
        return torch.cat(indices, dim=1), torch.cat(anchors, dim=1)


@dataclass(frozen=True)
class FCOSAssigner:
    """FCOS (arXiv 1904.01355, section 3.2): a level learns the objects of its sizes.

    A ground truth takes the points inside it from which the farthest of its sides is at a distance
    in the range of the level. A point in several goes to the smallest, the first at equal area.

    Args:
        ranges: (lowest, highest) distance of each level in pixels, both inclusive.
        center_sampling_radius: take only points less than so many strides from the centre of the
            ground truth in x and in y; None takes all inside it.
    """

    ranges: Sequence[tuple[float, float]] = (
        (-1, 64),
        (64, 128),
        (128, 256),
        (256, 512),
        (512, 1e8),
    )
    center_sampling_radius: float | None = None

    def __post_init__(self) -> None:
        if not all(low <= high for low, high in self.ranges):
            raise ValueError(f"Ranges are (lowest, highest) distances, not {self.ranges}.")
        if self.center_sampling_radius is not None and not self.center_sampling_radius > 0:
            raise ValueError(
                f"The radius of center sampling is positive, not {self.center_sampling_radius}."
            )

    def __call__(
        self, points: Sequence[Tensor], strides: Sequence[int], gt_boxes: Tensor
    ) -> Tensor:
        """Assign the points of one image.

        Args:
            points: L tensors (R_l, 2), in any order.
            strides: pixels of a cell of each level.
            gt_boxes: (G, 4). One without area, inverted, or not finite takes no point.

        Returns:
            (R,) int64 in [-1, G), in the order of the levels; all -1 without ground truth.

        Raises:
            ValueError: a level without stride or range, or boxes that are not (G, 4).
        """
        if len(points) != len(self.ranges):
            raise ValueError(
                f"FCOS has ranges for {len(self.ranges)} levels and got points of {len(points)}."
            )
        points, gt_boxes = _checked(points, strides, gt_boxes)
        if len(gt_boxes) == 0:
            return gt_boxes.new_full((sum(map(len, points)),), -1, dtype=torch.int64)
        # The first box that takes a point is then the smallest.
        by_area = (gt_boxes[:, 2:] - gt_boxes[:, :2]).prod(dim=1).argsort(stable=True)
        first = torch.cat(
            [
                self._first_that_takes(level, stride, limits, gt_boxes[by_area])
                for level, stride, limits in zip(points, strides, self.ranges)
            ]
        )
        return torch.where(first >= 0, by_area[first], -1)

    def _first_that_takes(
        self, points: Tensor, stride: int, limits: tuple[float, float], gt_boxes: Tensor
    ) -> Tensor:
        """Of the points (R_l, 2) of a level the first ground truth that takes each: (R_l,)."""
        # From inside, the farthest side is at half of the longer side's length at least.
        longer = (gt_boxes[:, 2:] - gt_boxes[:, :2]).amax(dim=1)
        (fitting,) = torch.where((longer >= limits[0]) & (longer / 2 <= limits[1]))
        if len(fitting) == 0:
            return fitting.new_full((len(points),), -1)
        chunk = max(1, (_GPU_PAIRS if points.is_cuda else _CPU_PAIRS) // len(fitting))
        taken = [
            self._takes(part, stride, limits, gt_boxes[fitting]) for part in points.split(chunk)
        ]
        any_taken, first = torch.cat(taken).max(dim=1)
        return torch.where(any_taken, fitting[first], -1)

    def _takes(
        self, points: Tensor, stride: int, limits: tuple[float, float], gt_boxes: Tensor
    ) -> Tensor:
        """Whether each ground truth takes each of the points (P, 2) of a level: (P, G)."""
        points, region = points[:, None], gt_boxes
        if self.center_sampling_radius is not None:
            region = _center_region(gt_boxes, self.center_sampling_radius * stride)
        inside = reduce(torch.minimum, _side_distances(points, region)) > 0
        farthest = reduce(torch.maximum, _side_distances(points, gt_boxes))
        return inside & (farthest == farthest.clamp(*limits))


def _checked(
    points: Sequence[Tensor], strides: Sequence[int], gt_boxes: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Points and boxes in the type of the boxes, at least float32."""
    if len(points) != len(strides):
        raise ValueError(f"{len(points)} levels of points need as many strides, not {strides}.")
    if gt_boxes.dim() != 2 or gt_boxes.shape[1] != 4:
        raise ValueError(f"Ground-truth boxes have the shape (G, 4), not {tuple(gt_boxes.shape)}.")
    dtype = torch.promote_types(gt_boxes.dtype, torch.float32)
    # A box without area takes no point, so that one which is not finite does not either.
    finite = gt_boxes.isfinite().all(dim=1, keepdim=True)
    return [level.to(dtype) for level in points], gt_boxes.to(dtype).where(finite, 0)


def _side_distances(points: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distances of points (..., 2) to the left, top, right and bottom of boxes (..., 4).

    Each (...); all are positive inside a box.
    """
    x, y = points.unbind(dim=-1)
    x1, y1, x2, y2 = boxes.unbind(dim=-1)
    return x - x1, y - y1, x2 - x, y2 - y


def _adaptive_threshold(ious: Tensor) -> Tensor:
    """Mean plus standard deviation of each row of (G, C), as (G, 1) float64.

    In float64 equal IoUs have a threshold equal to them: they are all positive.
    """
    ious = ious.double()
    correction = min(1, ious.shape[1] - 1)
    return ious.mean(dim=1, keepdim=True) + ious.std(dim=1, correction=correction, keepdim=True)


def _highest_claim(points: Tensor, gt_index: Tensor, ious: Tensor, count: int) -> Tensor:
    """Each of `count` points -> the ground truth that claims it with the highest IoU, or -1.

    Args:
        points, gt_index, ious: of each claim.
    """
    highest = ious.new_zeros(count).scatter_reduce_(0, points, ious, "amax")
    wins = ious == highest[points]
    nobody = torch.iinfo(torch.int64).max
    winner = gt_index.new_full((count,), nobody)
    winner.scatter_reduce_(0, points[wins], gt_index[wins], "amin")
    return winner.masked_fill_(winner == nobody, -1)


def _center_region(boxes: Tensor, radius: float) -> Tensor:
    """The squares of side 2 * `radius` around the centres of boxes (G, 4), clipped to the boxes."""
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    return torch.cat(
        [
            torch.maximum(centers - radius, boxes[:, :2]),
            torch.minimum(centers + radius, boxes[:, 2:]),
        ],
        dim=1,
    )
