"""How well the anchors or points of a detector fit objects, without a model.

Objects do not compete here: where several claim an anchor or a point, fewer learn. Shape letters:
G objects. Boxes are XYXY in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PADDING = 32  # images are padded to a multiple of this: the coarsest stride of a ResNet with FPN
_ATSS_INSIDE = 0.01  # pixels by which ATSS wants a point inside of an object


@dataclass(frozen=True)
class Anchors:
    """The IoU of an object with its best anchor; from `threshold` on an anchor learns it.

    levels: stride, sizes and ratios (height / width) of each set of anchors. offset: of a centre in
    its cell. padding: images are padded to a multiple of it.
    """

    levels: tuple[tuple[int, tuple[float, ...], tuple[float, ...]], ...]
    offset: float
    threshold: float
    padding: int = PADDING

    @property
    def title(self) -> str:
        return (
            f"IoU of an object with its best anchor. All anchors from {self.threshold:g} on learn "
            "it; where there is none,\nits best one alone does"
        )

    @property
    def reached(self) -> str:
        return f"IoU >= {self.threshold:g}"

    def measure(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Of boxes (G, 4) in images of (width, height) `sizes` (G, 2) the highest IoU: (G,).

        Of anchors of one shape the one whose centre is nearest, along both axes, is the best.
        """
        sides, centers = boxes[:, 2:] - boxes[:, :2], (boxes[:, :2] + boxes[:, 2:]) / 2
        areas, best = sides.prod(axis=1), np.zeros(len(boxes))
        for stride, anchor_sizes, ratios in self.levels:
            index = np.round(centers / stride - self.offset)
            index = np.clip(index, 0, cells(sizes, stride, self.padding) - 1)
            reach = sides / 2 - np.abs((index + self.offset) * stride - centers)
            for size in anchor_sizes:
                for ratio in ratios:
                    anchor = np.array([size / ratio**0.5, size * ratio**0.5])
                    overlap = np.minimum(reach + anchor / 2, np.minimum(sides, anchor))
                    common = np.maximum(overlap, 0).prod(axis=1)
                    np.maximum(best, common / (areas + anchor.prod() - common), out=best)
        return best


@dataclass(frozen=True)
class RangePoints:
    """FCOS: the number of points inside an object at whose level its size is learnt.

    levels: stride, shortest and longest distance from a point to the farthest side of its object.
    offset: of a point in its cell. radius: of the centre region, in strides, or 0.
    """

    levels: tuple[tuple[int, float, float], ...]
    offset: float
    radius: float = 0.0
    threshold: float = 1.0

    title = "FCOS: points that can learn an object, inside of it and on the level of its size"
    reached = ">= 1 point"

    def measure(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Boxes (G, 4) in images of (width, height) `sizes` (G, 2) -> (G,) float64."""
        middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        total = np.zeros(len(boxes))
        for stride, low, high in self.levels:
            reach = np.minimum(half, self.radius * stride) if self.radius else half
            inside = points_inside(middle - reach, middle + reach, sizes, stride, self.offset)
            # The farthest side is at |distance to the middle| + half, of the larger axis.
            near = np.ceil((middle - (high - half)) / stride - self.offset)
            far = np.floor((middle + (high - half)) / stride - self.offset)
            first, last = np.maximum(inside[0], near), np.minimum(inside[1], far)
            too_near = np.floor((middle - (low - half)) / stride - self.offset) + 1
            too_far = np.ceil((middle + (low - half)) / stride - self.offset) - 1
            total += _number(first, last)
            total -= _number(np.maximum(first, too_near), np.minimum(last, too_far))
        return total


@dataclass(frozen=True)
class NearestPoints:
    """ATSS: the number of points inside an object, of the 3 x 3 around its centre on each level.

    ATSS takes the 9 nearest, which are these but for ties and grids of one or two rows. Those of
    them whose anchors fit better than the others then learn the object.
    """

    strides: tuple[int, ...]
    offset: float
    threshold: float = 1.0

    title = "ATSS: candidate points inside of an object; the better ones of them learn it"
    reached = ">= 1 point"

    def measure(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Boxes (G, 4) in images of (width, height) `sizes` (G, 2) -> (G,) float64."""
        low, high = boxes[:, :2] + _ATSS_INSIDE, boxes[:, 2:] - _ATSS_INSIDE
        total = np.zeros(len(boxes))
        for stride in self.strides:
            first, last = points_inside(low, high, sizes, stride, self.offset)
            nearest = np.round((low + high) / 2 / stride - self.offset)
            nearest = np.clip(nearest, 1, np.maximum(cells(sizes, stride) - 2, 1))
            total += _number(np.maximum(first, nearest - 1), np.minimum(last, nearest + 1))
        return total


@dataclass(frozen=True)
class Pixels:
    """The shorter side of an object in cells of UnitBox's confidence feature.

    Every object of a pixel has positive pixels; but those of one cell can hardly differ.
    """

    stride: int
    threshold: float = 1.0

    @property
    def title(self) -> str:
        return f"UnitBox: the shorter side of an object, in cells of {self.stride} pixels"

    reached = ">= 1 cell"

    def measure(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Boxes (G, 4) in images of (width, height) `sizes` (G, 2) -> (G,)."""
        return (boxes[:, 2:] - boxes[:, :2]).min(axis=1) / self.stride


def cells(sizes: np.ndarray, stride: int, padding: int = PADDING) -> np.ndarray:
    """Columns and rows (G, 2) of a level for images of (width, height) `sizes` (G, 2), padded to a
    multiple of `padding`."""
    return np.ceil(np.ceil(sizes / padding) * padding / stride)


def points_inside(
    low: np.ndarray, high: np.ndarray, sizes: np.ndarray, stride: int, offset: float
) -> tuple[np.ndarray, np.ndarray]:
    """First and last column and row (G, 2) of points between the corners `low` and `high` (G, 2),
    which are not inside themselves. The last is lower than the first where there is none."""
    first = np.floor(low / stride - offset) + 1
    last = np.ceil(high / stride - offset) - 1
    return np.maximum(first, 0), np.minimum(last, cells(sizes, stride) - 1)


def _number(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Points of each block from column and row `first` to `last` (G, 2): (G,)."""
    return np.maximum(last - first + 1, 0).prod(axis=1)
