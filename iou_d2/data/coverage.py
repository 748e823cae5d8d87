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

from .matching import PADDING, Anchors, NearestPoints, Pixels, RangePoints
from .statistics import Objects

# Strides of what RefineDet's VGG-16 puts out.
_REFINEDET_STRIDES = {"conv4_3": 8, "conv5_3": 16, "fc7": 32, "conv6_2": 64}


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
class SquareResize:
    """To squares of `side` pixels, as INPUT.AUGMENTATIONS "square" does."""

    side: int

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """Widths and heights (I, 2) -> factors (I, 2) by which the axes grow."""
        return self.side / sizes


Matching = Anchors | RangePoints | NearestPoints | Pixels


def resized(objects: Objects, resize: Resize | SquareResize) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (G, 4) of the network input, and width and height (G, 2) of their images there.

    With a crop they are those of the whole image, resized as the crop is: what the crop cuts off
    is not known before it is drawn.
    """
    scale = resize(objects.sizes)[objects.images]
    return objects.boxes * np.tile(scale, 2), objects.sizes[objects.images] * scale


def resize_of(cfg) -> Resize | SquareResize:
    """The resize of training that `cfg` asks for. Raises InputError for an unknown crop."""
    node = cfg.INPUT
    if "square" in node.AUGMENTATIONS:
        return SquareResize(node.SQUARE_SIZE)
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
    if name in ("SSD", "IoUAwareSSD"):
        return _default_boxes(cfg)
    if name == "RefineDet":
        return _refinedet_anchors(cfg)
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
    levels = _generated_levels(cfg, [stride_of(feature) for feature in features])
    if 1 not in labels:
        raise InputError("No anchor of this config can learn an object.")
    # Labels are those between the thresholds: the first positive one begins at the one before it.
    threshold = thresholds[list(labels).index(1) - 1]
    return Anchors(levels, cfg.MODEL.ANCHOR_GENERATOR.OFFSET, threshold)


def _generated_levels(cfg, strides: list[int]) -> tuple:
    """The levels of Anchors that Detectron2's generator makes."""
    node = cfg.MODEL.ANCHOR_GENERATOR
    if node.NAME != "DefaultAnchorGenerator":
        raise InputError(f"Anchors of MODEL.ANCHOR_GENERATOR.NAME {node.NAME} are not known.")
    sizes = _of_levels(node.SIZES, len(strides), "SIZES")
    ratios = _of_levels(node.ASPECT_RATIOS, len(strides), "ASPECT_RATIOS")
    if not all(sizes) or not all(ratios):
        raise InputError("No anchor of this config can learn an object.")
    return tuple(zip(strides, sizes, ratios))


def _refinedet_anchors(cfg) -> Anchors:
    """The anchors of RefineDet's first step, which the second one moves."""
    features = cfg.MODEL.RETINANET.IN_FEATURES
    strides = [_REFINEDET_STRIDES.get(name) or stride_of(name) for name in features]
    threshold = cfg.MODEL.REFINEDET.ARM_IOU_THRESHOLDS[1]
    levels = _generated_levels(cfg, strides)
    return Anchors(levels, cfg.MODEL.ANCHOR_GENERATOR.OFFSET, threshold, _padding(cfg))


def _default_boxes(cfg) -> Anchors:
    """SSD's default boxes: of each level those of the smaller size, and the larger square."""
    node, names = cfg.MODEL.SSD, cfg.MODEL.RETINANET.IN_FEATURES
    if node.CLIP != "none":
        raise InputError(f"Boxes of MODEL.SSD.CLIP {node.CLIP} are not looked at, none is.")
    strides = node.STEPS or [stride_of(name) for name in names]
    if not len(strides) == len(node.ASPECT_RATIOS) == len(names):
        raise InputError("MODEL.SSD has other levels than MODEL.RETINANET.IN_FEATURES.")
    rise = (node.MAX_RATIO - node.MIN_RATIO) // max(len(names) - 2, 1)
    percents = [node.FIRST_RATIO, *(node.MIN_RATIO + i * rise for i in range(len(names)))]
    sizes = [cfg.INPUT.SQUARE_SIZE * percent / 100 for percent in percents]
    if node.TRUNCATE_SIZES:
        sizes = [float(int(size)) for size in sizes]
    levels = []
    for stride, small, large, ratios in zip(strides, sizes, sizes[1:], node.ASPECT_RATIOS):
        both = [1.0, *(x for ratio in ratios for x in (ratio, 1 / ratio))]
        levels += [(stride, (small,), tuple(both)), (stride, ((small * large) ** 0.5,), (1.0,))]
    threshold = cfg.MODEL.MULTIBOX.IOU_THRESHOLDS[1]
    return Anchors(tuple(levels), 0.5, threshold, _padding(cfg))


def _padding(cfg) -> int:
    """The VGG-16 of SSD and RefineDet rounds the sizes of its maps up and pads no image."""
    return 1 if cfg.MODEL.BACKBONE.NAME.endswith("_vgg16_backbone") else PADDING


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
