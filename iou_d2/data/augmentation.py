"""The augmentations of SSD (arXiv 1512.02325) for every detector, as Detectron2 has augmentations.

INPUT.AUGMENTATIONS names them in their order. Images are (H, W, 3) uint8, boxes (G, 4) XYXY in
pixels. Random numbers are NumPy's, as Detectron2's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from detectron2.data import transforms as T
from PIL import Image

from iou_d2.errors import InputError
from iou_d2.resize import ResizeShortestEdge

# Of Caffe's data layer: brightness in grey levels, hue in OpenCV's units of 2 degrees.
BRIGHTNESS, HUE = 32.0, 18.0
CONTRAST = SATURATION = (0.5, 1.5)
# IoU that a crop has with an object at least, one drawn by chance; 0 for any crop.
CROP_IOUS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
CROP_RATIOS = (0.5, 2.0)  # width / height, in sides of the image
CROP_TRIALS = 50
INTERPOLATIONS = (Image.BILINEAR, Image.BOX, Image.NEAREST, Image.BICUBIC, Image.LANCZOS)


@dataclass(frozen=True)
class Distortion:
    """What happens to the colours of an image; the defaults change nothing.

    Args:
        brightness: grey levels that are added.
        contrast: factor of all values.
        contrast_first: whether that comes before saturation and hue, or after them.
        saturation: factor of the saturation in HSV.
        hue: shift of the hue in degrees.
        is_bgr: the order of the channels, or RGB.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    contrast_first: bool = True
    saturation: float = 1.0
    hue: float = 0.0
    is_bgr: bool = True

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> the same; values end at 0 and 255 after every step."""
        values = np.clip(image.astype(np.float32) + self.brightness, 0, 255)
        if self.contrast_first:
            values = np.clip(values * self.contrast, 0, 255)
        values = self._change_hsv(values)
        if not self.contrast_first:
            values = np.clip(values * self.contrast, 0, 255)
        return (values + 0.5).astype(np.uint8)

    def _change_hsv(self, values: np.ndarray) -> np.ndarray:
        if self.saturation == 1 and self.hue == 0:
            return values
        to_hsv, back = (
            (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR)
            if self.is_bgr
            else (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB)
        )
        hsv = cv2.cvtColor(values / 255, to_hsv)  # hue in degrees, the others in [0, 1]
        hsv[..., 0] = (hsv[..., 0] + self.hue) % 360
        hsv[..., 1] = np.minimum(hsv[..., 1] * self.saturation, 1)
        return np.clip(cv2.cvtColor(hsv, back) * 255, 0, 255)


class RandomDistortion(T.Augmentation):
    """Brightness, contrast, saturation and hue, each with a chance of one half; contrast comes
    before the last two or after them. Caffe's channel swap has the chance 0 there, and is not here.
    """

    def __init__(self, is_bgr: bool = True):
        super().__init__()
        self.is_bgr = is_bgr

    def get_transform(self, image: np.ndarray) -> T.Transform:
        distortion = Distortion(
            brightness=_maybe(0.0, -BRIGHTNESS, BRIGHTNESS),
            contrast=_maybe(1.0, *CONTRAST),
            contrast_first=np.random.rand() < 0.5,
            saturation=_maybe(1.0, *SATURATION),
            hue=2 * _maybe(0.0, -HUE, HUE),
            is_bgr=self.is_bgr,
        )
        return T.ColorTransform(distortion)


class MeanPadTransform(T.PadTransform):
    """PadTransform whose border has a colour; that of a mask is 0."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        height, width = img.shape[:2]
        shape = (height + self.y0 + self.y1, width + self.x0 + self.x1, *img.shape[2:])
        canvas = np.empty(shape, dtype=img.dtype)
        canvas[:] = self.pad_value
        canvas[self.y0 : self.y0 + height, self.x0 : self.x0 + width] = img
        return canvas


class RandomExpand(T.Augmentation):
    """With a chance of one half the image lies anywhere on a larger canvas of the mean colour."""

    def __init__(self, mean: Sequence[float], max_ratio: float = 4.0):
        """
        Args:
            mean: the colour of the canvas, one value a channel.
            max_ratio: the canvas is 1 to so many times as wide and as high.
        """
        super().__init__()
        self.color = np.round(np.asarray(mean)).clip(0, 255)
        self.max_ratio = max_ratio

    def get_transform(self, image: np.ndarray) -> T.Transform:
        if np.random.rand() >= 0.5:
            return T.NoOpTransform()
        height, width = image.shape[:2]
        ratio = np.random.uniform(1, self.max_ratio)
        more_x, more_y = int(width * ratio) - width, int(height * ratio) - height
        x, y = (int(np.random.uniform(0, more + 1)) for more in (more_x, more_y))
        return MeanPadTransform(
            x, y, more_x - x, more_y - y, width, height, self.color.astype(image.dtype)
        )


class CenterCropTransform(T.CropTransform):
    """CropTransform that keeps an object whose centre is in the crop: others get an empty box,
    which Detectron2's mappers leave out."""

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        """(G, 4) boxes of the image -> their parts in the crop."""
        box = np.asarray(box, dtype=float).reshape(-1, 4)
        center = (box[:, :2] + box[:, 2:]) / 2 - (self.x0, self.y0)
        inside = ((center > 0) & (center < (self.w, self.h))).all(axis=1)
        # Clipped here, and not at last by the mapper: an expansion that follows adds a border.
        return super().apply_box(box).clip(0, (self.w, self.h) * 2) * inside[:, None]


class IoUCrop(T.Augmentation):
    """The whole image, or a part of it whose IoU with some object reaches a bound.

    For each bound of CROP_IOUS a crop is looked for in CROP_TRIALS trials; one of those found, or
    the whole image, is drawn by chance. Sides are fractions of those of the image, as in Caffe.
    Where no boxes are known nothing is cut.
    """

    def __init__(self, sizes: Sequence[float] = (0.3, 1.0)):
        """`sizes`: of the shortest and the longest crop, in sides of the image."""
        super().__init__()
        self.sizes = tuple(sizes)

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None) -> T.Transform:
        height, width = image.shape[:2]
        if boxes is None or not len(boxes):
            return T.NoOpTransform()
        relative = np.asarray(boxes, dtype=float) / (width, height, width, height)
        crops = [self._crop(relative, iou) for iou in CROP_IOUS]
        crops = [crop for crop in crops if crop is not None]
        drawn = np.random.randint(len(crops) + 1)
        if drawn == len(crops):
            return T.NoOpTransform()
        x1, y1, x2, y2 = (crops[drawn] * (width, height, width, height)).astype(int)
        x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
        return CenterCropTransform(x1, y1, x2 - x1, y2 - y1, width, height)

    def _crop(self, boxes: np.ndarray, min_iou: float) -> np.ndarray | None:
        """The first of CROP_TRIALS crops that fits, in sides of the image: (4,); None without."""
        scale = np.random.uniform(*self.sizes, CROP_TRIALS)
        ratio = np.random.uniform(
            np.maximum(CROP_RATIOS[0], scale**2), np.minimum(CROP_RATIOS[1], scale**-2)
        )
        sides = np.stack([scale * ratio**0.5, scale / ratio**0.5], axis=1)
        corners = np.random.uniform(0, np.maximum(1 - sides, 0))
        crops = np.concatenate([corners, corners + sides], axis=1)
        (fitting,) = np.nonzero((iou_of(crops, boxes) >= min_iou).any(axis=1))
        return crops[fitting[0]].clip(0, 1) if len(fitting) else None


def iou_of(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """IoU of boxes (A, 4) with boxes (B, 4): (A, B); 0 where neither has an area."""
    low = np.maximum(boxes1[:, None, :2], boxes2[:, :2])
    high = np.minimum(boxes1[:, None, 2:], boxes2[:, 2:])
    common = np.maximum(high - low, 0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (boxes1, boxes2)]
    return common / np.maximum(areas[0][:, None] + areas[1] - common, np.finfo(float).tiny)


class SquareResize(T.Augmentation):
    """To a square, whatever the shape, with one of some interpolations by chance."""

    def __init__(self, side: int, interpolations: Sequence[int] = (Image.BILINEAR,)):
        super().__init__()
        self.side = side
        self.interpolations = tuple(interpolations)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        # With a single one no random number is drawn.
        index = np.random.randint(len(self.interpolations)) if len(self.interpolations) > 1 else 0
        height, width = image.shape[:2]
        return T.ResizeTransform(height, width, self.side, self.side, self.interpolations[index])


def _distort(cfg, is_train: bool) -> T.Augmentation:
    return RandomDistortion(is_bgr=cfg.INPUT.FORMAT == "BGR")


def _expand(cfg, is_train: bool) -> T.Augmentation:
    if cfg.INPUT.EXPAND_RATIO < 1:
        raise InputError(f"INPUT.EXPAND_RATIO is at least 1, but it is {cfg.INPUT.EXPAND_RATIO}.")
    return RandomExpand(cfg.MODEL.PIXEL_MEAN, cfg.INPUT.EXPAND_RATIO)


def _iou_crop(cfg, is_train: bool) -> T.Augmentation:
    sizes = list(cfg.INPUT.IOU_CROP_SIZES)
    are_numbers = all(isinstance(size, (int, float)) for size in sizes)
    if len(sizes) != 2 or not are_numbers or not 0 < sizes[0] <= sizes[1] <= 1:
        raise InputError(
            f"INPUT.IOU_CROP_SIZES is two rising sides over 0 and up to 1, but it is {sizes}."
        )
    return IoUCrop(sizes)


def _square(cfg, is_train: bool) -> T.Augmentation:
    if cfg.INPUT.SQUARE_SIZE < 1:
        raise InputError(f"INPUT.SQUARE_SIZE is at least 1, but it is {cfg.INPUT.SQUARE_SIZE}.")
    return SquareResize(cfg.INPUT.SQUARE_SIZE, INTERPOLATIONS if is_train else (Image.BILINEAR,))


def _shortest_edge(cfg, is_train: bool) -> T.Augmentation:
    node = cfg.INPUT
    if is_train:
        return ResizeShortestEdge(
            node.MIN_SIZE_TRAIN, node.MAX_SIZE_TRAIN, node.MIN_SIZE_TRAIN_SAMPLING
        )
    return ResizeShortestEdge(node.MIN_SIZE_TEST, node.MAX_SIZE_TEST, "choice")


def _flip(cfg, is_train: bool) -> T.Augmentation:
    direction = cfg.INPUT.RANDOM_FLIP
    if direction == "none":
        return T.NoOpTransform()
    return T.RandomFlip(horizontal=direction == "horizontal", vertical=direction == "vertical")


# Name in INPUT.AUGMENTATIONS -> (cfg, is_train) -> what it is.
AUGMENTATIONS: dict[str, Callable[[object, bool], T.Augmentation]] = {
    "distort": _distort,
    "expand": _expand,
    "iou_crop": _iou_crop,
    "square": _square,
    "shortest_edge": _shortest_edge,
    "flip": _flip,
}
# Those that test images need, too.
RESIZES = ("square", "shortest_edge")


def build_augmentations(cfg, is_train: bool) -> list[T.Augmentation]:
    """What INPUT.AUGMENTATIONS, which is not empty, names for training or for testing.

    Raises:
        InputError: an unknown name; not exactly one resize; INPUT.CROP beside it; a value that an
            augmentation cannot take.
    """
    names = list(cfg.INPUT.AUGMENTATIONS)
    known = list(AUGMENTATIONS)  # in which also a list can be looked for
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"INPUT.AUGMENTATIONS takes names from {', '.join(AUGMENTATIONS)}, but it has "
            f"{unknown[0]!r}."
        )
    if sum(name in RESIZES for name in names) != 1:
        raise InputError(
            f"INPUT.AUGMENTATIONS has one of {' and '.join(RESIZES)}, which resizes test images "
            f"as well, but it is {names}."
        )
    if cfg.INPUT.CROP.ENABLED:
        raise InputError(
            "INPUT.CROP.ENABLED is True, but INPUT.AUGMENTATIONS says all that happens to an "
            'image: set it to False, or name "iou_crop" there.'
        )
    chosen = names if is_train else [name for name in names if name in RESIZES]
    return [AUGMENTATIONS[name](cfg, is_train) for name in chosen]


def _maybe(default: float, low: float, high: float) -> float:
    """A number between `low` and `high`, or, with a chance of one half, `default`."""
    return np.random.uniform(low, high) if np.random.rand() < 0.5 else default
