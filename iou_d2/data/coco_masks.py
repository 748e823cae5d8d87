"""Segmentations of a COCO file, checked before pycocotools, which trusts them, sees them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .coco_values import as_number


def is_good_mask(value: Any, size: tuple[int, int] | None) -> bool:
    """Whether Detectron2 can read this segmentation, or takes it for absent.

    Polygons are lists of finite numbers, one of which at least has three points. RLE is of an image
    of `size` (width, height) and its counts add up to it; None leaves the size open.
    """
    if not value:
        return True
    if isinstance(value, dict):
        return _is_good_rle(value, size)
    if not isinstance(value, list):
        return False
    usable = False
    for polygon in value:
        if not isinstance(polygon, list):
            return False
        try:
            if not math.isfinite(math.fsum(polygon)) or max(map(abs, polygon), default=0) >= 1e12:
                return False
        except (TypeError, ValueError, OverflowError):
            return False
        usable = usable or (len(polygon) >= 6 and len(polygon) % 2 == 0)
    return usable


def mend_mask(value: Any) -> list | None:
    """Polygons from one flat list [x, y, x, y, ...] or from numbers as strings; else None."""
    if not isinstance(value, list) or not value:
        return None
    polygons = value if all(isinstance(polygon, list) for polygon in value) else [value]
    mended = [[as_number(v) for v in polygon] for polygon in polygons]
    good = all(v is not None for polygon in mended for v in polygon)
    return mended if good and is_good_mask(mended, None) else None


def _is_good_rle(rle: dict, size: tuple[int, int] | None) -> bool:
    shape = rle.get("size")
    if not isinstance(shape, list) or len(shape) != 2:
        return False
    height, width = shape
    if type(height) is not int or type(width) is not int or min(shape) < 1:
        return False
    if size is not None and size != (width, height):
        return False
    if height * width >= 2**32:  # pycocotools counts in 32 bits
        return False
    counts = rle.get("counts")
    if isinstance(counts, list):
        return all(type(n) is int and n >= 0 for n in counts) and sum(counts) == height * width
    return isinstance(counts, str) and _pixels(counts) == height * width


def _pixels(counts: str) -> int | None:
    """The number of pixels of a compressed RLE; None if it is none.

    A count is written in groups of five bits, the lowest first; bit 5 says that more follow, bit 4
    of the last one is the sign. From the fourth on, counts are differences to the last but one.
    """
    if not counts.isascii() or not counts:
        return None
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    starts = np.flatnonzero(np.concatenate([[True], (codes[:-1] & 32) == 0]))
    lengths = np.diff(np.append(starts, len(codes)))
    if lengths.max() > 7:
        return None
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((codes & 31) << (5 * place), starts)
    is_negative = (codes[starts + lengths - 1] & 16) != 0
    numbers = numbers - np.where(is_negative, 1 << (5 * lengths), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    # Counts 0, 1 and 2 stand for themselves, so the even sums begin at count 2.
    numbers[2::2] = np.cumsum(numbers[2::2])
    return None if numbers.min() < 0 else int(numbers.sum())


def good_keypoints(value: Any) -> bool:
    """Whether these are triples of finite numbers, or none at all."""
    if not value:
        return value is None or isinstance(value, list)
    if not isinstance(value, list) or len(value) % 3:
        return False
    return all(type(v) in (int, float) and as_number(v) is not None for v in value)


def rotated_rectangle(box: list[float], degrees: float) -> list[float]:
    """The corners (x, y, x, y, ...) of a box XYWH turned about its centre, clockwise as seen."""
    x, y, w, h = box
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = []
    for dx, dy in ((-w, -h), (w, -h), (w, h), (-w, h)):
        corners += [x + w / 2 + (dx * cos - dy * sin) / 2, y + h / 2 + (dx * sin + dy * cos) / 2]
    return corners


def turn(annotation: dict) -> dict | None:
    """The annotation with the box that encloses it as CVAT turned it; None if it is not turned.

    CVAT writes the unturned box, and degrees in attributes.rotation. Where the annotation has a
    mask of its own, that is not the rectangle of the box, the box is already around it.
    """
    attributes = annotation.get("attributes")
    degrees = as_number(attributes.get("rotation")) if isinstance(attributes, dict) else None
    if not degrees or degrees % 360 == 0:
        return None
    box = annotation["bbox"]
    mask = annotation.get("segmentation")
    if mask and not _is_rectangle(mask, box):
        return None
    corners = rotated_rectangle(box, degrees)
    xs, ys = corners[::2], corners[1::2]
    turned = {**annotation, "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]}
    turned["attributes"] = {**attributes, "rotation": 0.0}  # who reads it again turns no more
    if mask:
        turned["segmentation"] = [corners]
    return turned


def _is_rectangle(mask: Any, box: list[float]) -> bool:
    if not isinstance(mask, list) or len(mask) != 1 or len(mask[0]) != 8:
        return False
    x, y, w, h = box
    corners = {(x, y), (x + w, y), (x + w, y + h), (x, y + h)}
    points = list(zip(mask[0][::2], mask[0][1::2]))
    return all(any(math.dist(p, c) < 0.5 for p in points) for c in corners)
