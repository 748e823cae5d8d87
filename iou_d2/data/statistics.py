"""What the objects of a dataset are like: counts, sizes, and what looks odd in them.

Takes Detectron2's dicts. Shape letters: G objects without the crowds, I images, K classes. Boxes
are XYXY in pixels of the image.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

# COCO's: the area of a small object is below 32^2 pixels, that of a large one at least 96^2.
SMALL, LARGE = 32.0**2, 96.0**2
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
FEW = 10  # objects; a class with fewer hardly learns
LONG = 10.0  # times as long as wide, or as wide as long: rare but in text, poles and mistakes


@dataclass(frozen=True)
class Objects:
    """The objects of a dataset; crowds are only counted."""

    boxes: np.ndarray  # (G, 4) float64
    classes: np.ndarray  # (G,) int64, index of the class
    images: np.ndarray  # (G,) int64, index of the image
    sizes: np.ndarray  # (I, 2) float64: width, height
    crowds: int

    @property
    def sides(self) -> np.ndarray:
        """(G, 2): width, height."""
        return self.boxes[:, 2:] - self.boxes[:, :2]

    @property
    def empty_images(self) -> int:
        """Images without an object; what has crowds alone is one of them."""
        return len(self.sizes) - len(np.unique(self.images))


def collect(dicts: Sequence[dict[str, Any]]) -> Objects:
    """The objects of `dicts`, which have a width and a height each. No dicts give no objects."""
    boxes, classes, images, crowds = [], [], [], 0
    for index, record in enumerate(dicts):
        for annotation in record.get("annotations", ()):
            if annotation.get("iscrowd", 0):
                crowds += 1
                continue
            boxes.append(_xyxy(annotation))
            classes.append(annotation["category_id"])
            images.append(index)
    sizes = [(record["width"], record["height"]) for record in dicts]
    return Objects(
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(classes, dtype=np.int64),
        np.array(images, dtype=np.int64),
        np.array(sizes, dtype=np.float64).reshape(-1, 2),
        crowds,
    )


def joined(parts: Sequence[Objects]) -> Objects:
    """The objects of several datasets, each with the class indices of its own. At least one."""
    starts = np.cumsum([0, *(len(part.sizes) for part in parts)])
    return Objects(
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.classes for part in parts]),
        np.concatenate([part.images + start for part, start in zip(parts, starts)]),
        np.concatenate([part.sizes for part in parts]),
        sum(part.crowds for part in parts),
    )


def _xyxy(annotation: dict[str, Any]) -> Sequence[float]:
    box, mode = annotation["bbox"], annotation["bbox_mode"]
    if mode == BoxMode.XYWH_ABS:  # BoxMode.convert takes ten times as long
        return box[0], box[1], box[0] + box[2], box[1] + box[3]
    return box if mode == BoxMode.XYXY_ABS else BoxMode.convert(box, mode, BoxMode.XYXY_ABS)


def count_classes(objects: Objects, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Objects of each of `number` classes, and images that hold one: (K,) and (K,)."""
    pairs = np.unique(objects.images * number + objects.classes)
    return (
        np.bincount(objects.classes, minlength=number),
        np.bincount(pairs % max(number, 1), minlength=number),
    )


def count_sizes(objects: Objects) -> dict[str, int]:
    """Objects that are small, medium and large by the area of their box."""
    area = objects.sides.prod(axis=1)
    small, large = int((area < SMALL).sum()), int((area >= LARGE).sum())
    return {"small": small, "medium": len(area) - small - large, "large": large}


def percentiles(values: np.ndarray) -> list[float]:
    """The PERCENTILES of `values` (G,); none gives an empty list."""
    return np.percentile(values, PERCENTILES).tolist() if len(values) else []


def hints(objects: Objects, class_names: Sequence[str]) -> list[str]:
    """Sentences about what may be a mistake in the annotations."""
    sides = objects.sides
    shorter, longer = sides.min(axis=1), sides.max(axis=1)
    places = [objects.images, *objects.boxes.T]
    twice = _repeats([*places, objects.classes])
    counted = [
        (int((shorter < 1).sum()), "have a side under one pixel"),
        (int((longer > LONG * shorter).sum()), f"are over {LONG:g} times as long as wide"),
        (twice, "repeat the box and the class of another in their image"),
        (_repeats(places) - twice, "repeat the box of another of their image with another class"),
    ]
    found = [f"{number} of {len(sides)} objects {what}." for number, what in counted if number]
    counts, _ = count_classes(objects, len(class_names))
    rare = [f"{name} ({n})" for name, n in zip(class_names, counts) if n < FEW]
    if rare:
        shown = ", ".join(rare[:10]) + (", ..." if len(rare) > 10 else "")
        found.append(f"{len(rare)} of {len(counts)} classes have under {FEW} objects: {shown}.")
    return found


def alike(class_names: Iterable[str]) -> list[list[str]]:
    """Names that are one but for upper case, blanks, "-" and "_", which may be one class."""
    groups = defaultdict(list)
    for name in dict.fromkeys(class_names):
        groups[re.sub(r"[\s_-]", "", name).casefold()].append(name)
    return [names for names in groups.values() if len(names) > 1]


def _repeats(columns: Sequence[np.ndarray]) -> int:
    """How many rows of `columns` (G,) each are equal to an earlier one."""
    rows = list(zip(*(column.tolist() for column in columns)))
    return len(rows) - len(set(rows))  # numpy's sorting takes several times as long


def shared_images(first: Sequence[str], second: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of files, one of each list, that are the same file or have the same bytes.

    Only files of equal length are read. Files that are not there or cannot be read are in no pair.
    """
    groups = [_by_length(first), _by_length(second)]
    pairs = []
    for length in groups[0].keys() & groups[1].keys():
        ours = set(groups[0][length])
        theirs = [path for path in groups[1][length] if path not in ours]
        pairs += [(path, path) for path in groups[1][length] if path in ours]
        contents = {_digest(path): path for path in groups[0][length]} if theirs else {}
        contents.pop(None, None)
        digests = [(path, _digest(path)) for path in theirs]
        pairs += [(contents[digest], path) for path, digest in digests if digest in contents]
    return sorted(pairs)


def _by_length(paths: Sequence[str]) -> dict[int, list[str]]:
    groups = defaultdict(list)
    for path in paths:
        try:
            groups[os.stat(path).st_size].append(path)
        except (OSError, ValueError):  # ValueError: a zero byte in the name
            continue
    return groups


def _digest(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).digest()
    except OSError:
        return None
