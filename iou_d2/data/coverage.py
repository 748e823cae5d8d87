"""How many objects of a dataset the anchors or points of a config can match, without a model.

Everything is computed from the config's keys: the resize of INPUT, anchor sizes and ratios, and the
strides that the names of features tell. Objects do not compete here: where several claim an anchor
or a point, fewer learn. Shape letters: G objects, I images. Boxes are XYXY in pixels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from iou_d2.errors import InputError

from .statistics import Objects

PADDING = 32  # images are padded to a multiple of this: the coarsest stride of a ResNet with FPN
_ATSS_INSIDE = 0.01  # pixels by which ATSS wants a point inside of an object


@dataclass(frozen=True)
class Resize:
    """Detectron2's ResizeShortestEdge: INPUT.MIN_SIZE_TRAIN, of several the middle one, and
    INPUT.MAX_SIZE_TRAIN; before it a crop of `crop` (width, height) pixels where there is one."""

    shortest: int
    longest: int
    crop: tuple[int, int] | None = None

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """Widths and heights (I, 2) -> factors (I, 2) by which the axes grow."""
        if self.crop is not None:
            sizes = np.minimum(sizes, self.crop)
        if self.shortest == 0:
            return np.ones_like(sizes)
        scale = self.shortest / sizes.min(axis=1)
        scale = np.minimum(scale, self.longest / sizes.max(axis=1))
        return np.floor(sizes * scale[:, None] + 0.5) / sizes


@dataclass(frozen=True)
class Anchors:
    """The IoU of an object with its best anchor; from `threshold` on an anchor learns it.

    levels: stride, sizes and ratios (height / width) of each. offset: of a centre in its cell.
    """

    levels: tuple[tuple[int, tuple[float, ...], tuple[float, ...]], ...]
    offset: float
    threshold: float

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
            index = np.clip(index, 0, cells(sizes, stride) - 1)
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


Matching = Anchors | RangePoints | NearestPoints | Pixels


def cells(sizes: np.ndarray, stride: int) -> np.ndarray:
    """Columns and rows (G, 2) of a level for images of (width, height) `sizes` (G, 2), padded."""
    return np.ceil(np.ceil(sizes / PADDING) * PADDING / stride)


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


def resized(objects: Objects, resize: Resize) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (G, 4) of the network input, and width and height (G, 2) of their images there.

    With a crop they are those of the whole image, resized as the crop is: what the crop cuts off
    is not known before it is drawn.
    """
    scale = resize(objects.sizes)[objects.images]
    return objects.boxes * np.tile(scale, 2), objects.sizes[objects.images] * scale


def resize_of(cfg) -> Resize:
    """The resize of training that `cfg` asks for. Raises InputError for an unknown crop."""
    node = cfg.INPUT
    sizes = sorted(np.atleast_1d(node.MIN_SIZE_TRAIN).tolist())
    if not sizes:
        raise InputError("INPUT.MIN_SIZE_TRAIN is empty.")
    middle = sizes[len(sizes) // 2]
    if node.MIN_SIZE_TRAIN_SAMPLING == "range":
        middle = (sizes[0] + sizes[-1]) // 2
    crop = None
    if node.CROP.ENABLED:
        if node.CROP.TYPE != "absolute":
            raise InputError(f"INPUT.CROP.TYPE {node.CROP.TYPE} is not looked at, absolute is.")
        crop = (int(node.CROP.SIZE[1]), int(node.CROP.SIZE[0]))
    return Resize(int(middle), int(node.MAX_SIZE_TRAIN), crop)


def matching_of(cfg) -> Matching:
    """What decides in a detector of `cfg` whether an object can be learnt.

    Raises InputError for a detector or a feature that is not known here.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if "RetinaNet" in name:
        node = cfg.MODEL.RETINANET
        return _anchors(cfg, node.IN_FEATURES, node.IOU_THRESHOLDS, node.IOU_LABELS)
    if name == "PointDetector":
        return _points(cfg)
    if name == "UnitBox":
        return Pixels(stride_of(cfg.MODEL.UNITBOX.CONFIDENCE_FEATURE))
    if name in ("GeneralizedRCNN", "ProposalNetwork"):
        proposals, node = cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.RPN
        if proposals not in ("RPN", "BoxLossRPN"):
            raise InputError(f"Anchors of MODEL.PROPOSAL_GENERATOR.NAME {proposals} are not known.")
        return _anchors(cfg, node.IN_FEATURES, node.IOU_THRESHOLDS, node.IOU_LABELS)
    raise InputError(f"What MODEL.META_ARCHITECTURE {name} can match is not known.")


def stride_of(feature: str) -> int:
    """The stride that the name of a feature tells: p3 of FPN, res4 of ResNet, conv4 of VGG."""
    found = re.fullmatch(r"(p|res|conv|pool)(\d)", feature)
    if found is None:
        raise InputError(f"The stride of the feature {feature} is not known.")
    kind, number = found[1], int(found[2])
    return 2 ** (number - 1 if kind == "conv" else number)


def _anchors(cfg, features, thresholds, labels) -> Anchors:
    node = cfg.MODEL.ANCHOR_GENERATOR
    if node.NAME != "DefaultAnchorGenerator":
        raise InputError(f"Anchors of MODEL.ANCHOR_GENERATOR.NAME {node.NAME} are not known.")
    strides = [stride_of(feature) for feature in features]
    sizes = _of_levels(node.SIZES, len(strides), "SIZES")
    ratios = _of_levels(node.ASPECT_RATIOS, len(strides), "ASPECT_RATIOS")
    if 1 not in labels or not all(sizes) or not all(ratios):
        raise InputError("No anchor of this config can learn an object.")
    # Labels are those between the thresholds: the first positive one begins at the one before it.
    threshold = thresholds[list(labels).index(1) - 1]
    return Anchors(tuple(zip(strides, sizes, ratios)), node.OFFSET, threshold)


def _of_levels(values, levels: int, key: str) -> tuple[tuple[float, ...], ...]:
    """One list for each level, as Detectron2 broadcasts them."""
    lists = values if values and isinstance(values[0], (list, tuple)) else [values]
    if len(lists) not in (1, levels):
        raise InputError(
            f"MODEL.ANCHOR_GENERATOR.{key} is for {len(lists)} levels, but there are {levels}."
        )
    return tuple(map(tuple, lists * levels if len(lists) == 1 else lists))


def _points(cfg) -> RangePoints | NearestPoints:
    node = cfg.MODEL.POINT_DETECTOR
    strides = [stride_of(feature) for feature in cfg.MODEL.RETINANET.IN_FEATURES]
    offset = node.POINT_OFFSET
    if node.ASSIGNER == "atss":
        return NearestPoints(tuple(strides), 0.0 if offset is None else offset)
    lowest = [0.0, *node.MAX_DISTANCES[:-1]]
    highest = [*node.MAX_DISTANCES[:-1], np.inf]
    if len(highest) != len(strides):
        raise InputError(
            f"MODEL.POINT_DETECTOR.MAX_DISTANCES is for {len(highest)} levels, but there are "
            f"{len(strides)}."
        )
    levels = tuple(zip(strides, lowest, highest))
    return RangePoints(levels, 0.5 if offset is None else offset, node.CENTER_SAMPLING_RADIUS)
