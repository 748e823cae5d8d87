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
    """Whether the best anchor of an object has at least `threshold` IoU with it.

    levels: stride, sizes and ratios (height / width) of each. offset: of a centre in its cell.
    """

    levels: tuple[tuple[int, tuple[float, ...], tuple[float, ...]], ...]
    offset: float
    threshold: float

    @property
    def meaning(self) -> str:
        return f"an anchor with IoU >= {self.threshold:g}"

    def __call__(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return self.best_iou(boxes, sizes) >= self.threshold

    def best_iou(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Of boxes (G, 4) in images of (width, height) `sizes` (G, 2) the highest IoU: (G,).

        Of anchors of one shape the one whose centre is nearest, along both axes, is the best.
        """
        sides, centers = boxes[:, 2:] - boxes[:, :2], (boxes[:, :2] + boxes[:, 2:]) / 2
        best = np.zeros(len(boxes))
        for stride, anchor_sizes, ratios in self.levels:
            index = np.round(centers / stride - self.offset)
            index = np.clip(index, 0, cells(sizes, stride) - 1)
            distance = np.abs((index + self.offset) * stride - centers)
            for size in anchor_sizes:
                for ratio in ratios:
                    anchor = np.array([size / ratio**0.5, size * ratio**0.5])
                    overlap = np.minimum((sides + anchor) / 2 - distance, np.minimum(sides, anchor))
                    common = np.maximum(overlap, 0).prod(axis=1)
                    union = sides.prod(axis=1) + anchor.prod() - common
                    np.maximum(best, common / union, out=best)
        return best


@dataclass(frozen=True)
class Points:
    """Whether a point of some level lies in an object and, for FCOS, in the level's range.

    levels: stride, shortest and longest distance from a point to the farthest side of its object.
    offset: of a point in its cell. radius: FCOS's, in strides, or 0. margin: by which the point
    lies inside. Exact where a range is wider than its stride, as in all papers.
    """

    levels: tuple[tuple[int, float, float], ...]
    offset: float
    radius: float = 0.0
    margin: float = 0.0

    @property
    def meaning(self) -> str:
        return "a point inside"

    def __call__(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Boxes (G, 4) in images of (width, height) `sizes` (G, 2) -> (G,) bool."""
        found = np.zeros(len(boxes), dtype=bool)
        for stride, low, high in self.levels:
            first, last = self._points_inside(boxes, sizes, stride)  # (G, 2) each
            exists = (first <= last).all(axis=1)
            middle = (boxes[:, :2] + boxes[:, 2:]) / 2
            index = np.clip(np.round(middle / stride - self.offset), first, last)
            nearest = np.abs((index + self.offset) * stride - middle)
            ends = np.stack([first, last])
            farthest = np.abs((ends + self.offset) * stride - middle).max(axis=0)
            half = (boxes[:, 2:] - boxes[:, :2]) / 2
            in_range = ((half + nearest).max(axis=1) <= high) & (
                (half + farthest).max(axis=1) >= low
            )
            found |= exists & in_range
        return found

    def _points_inside(
        self, boxes: np.ndarray, sizes: np.ndarray, stride: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """First and last column and row of points in each box; the last is lower where none is."""
        low, high = boxes[:, :2], boxes[:, 2:]
        if self.radius:
            middle, reach = (low + high) / 2, self.radius * stride
            low, high = np.maximum(low, middle - reach), np.minimum(high, middle + reach)
        first = np.floor((low + self.margin) / stride - self.offset) + 1
        last = np.ceil((high - self.margin) / stride - self.offset) - 1
        return np.maximum(first, 0), np.minimum(last, cells(sizes, stride) - 1)


@dataclass(frozen=True)
class Pixels:
    """Whether no side of an object is shorter than a cell of UnitBox's confidence feature.

    Every object of a pixel has positive pixels; but those of one cell can hardly differ.
    """

    stride: int

    @property
    def meaning(self) -> str:
        return f"no side under the stride of {self.stride}"

    def __call__(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return (boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= self.stride


Matching = Anchors | Points | Pixels


def cells(sizes: np.ndarray, stride: int) -> np.ndarray:
    """Columns and rows (G, 2) of a level for images of (width, height) `sizes` (G, 2), padded."""
    return np.ceil(np.ceil(sizes / PADDING) * PADDING / stride)


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
    if name in ("GeneralizedRCNN", "ProposalNetwork", "StandaloneIoUNet"):
        node = cfg.MODEL.RPN
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
    # Labels are those between the thresholds: the first positive one begins at the one before it.
    threshold = thresholds[list(labels).index(1) - 1]
    return Anchors(tuple(zip(strides, sizes, ratios)), node.OFFSET, threshold)


def _of_levels(values, levels: int, key: str) -> tuple[tuple[float, ...], ...]:
    """One list for each level, as Detectron2 broadcasts them."""
    lists = values if isinstance(values[0], (list, tuple)) else [values]
    if len(lists) not in (1, levels):
        raise InputError(
            f"MODEL.ANCHOR_GENERATOR.{key} is for {len(lists)} levels, but there are {levels}."
        )
    return tuple(map(tuple, lists * levels if len(lists) == 1 else lists))


def _points(cfg) -> Points:
    node = cfg.MODEL.POINT_DETECTOR
    strides = [stride_of(feature) for feature in cfg.MODEL.RETINANET.IN_FEATURES]
    offset = node.POINT_OFFSET
    if node.ASSIGNER == "atss":
        levels = tuple((stride, 0.0, np.inf) for stride in strides)
        return Points(levels, 0.0 if offset is None else offset, margin=_ATSS_INSIDE)
    lowest = [0.0, *node.MAX_DISTANCES[:-1]]
    highest = [*node.MAX_DISTANCES[:-1], np.inf]
    levels = tuple(zip(strides, lowest, highest))
    return Points(levels, 0.5 if offset is None else offset, node.CENTER_SAMPLING_RADIUS)
