"""COCO's classes in torchvision's detectors, which count by its ids: 1 to 90, of which 80 are used.

Their heads of sigmoids have 91 rows of classes, of which row 0 and those of unused ids learnt
nothing; R-CNNs have 90 beside the background. Detectron2 has the 80 in order of their ids.
"""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

from iou_d2.engine.class_rows import ModelClasses

_NAMES = {x["id"]: x["name"] for x in COCO_CATEGORIES if x["isthing"]}
COCO_NAMES = list(_NAMES.values())


def names_of_rows(count: int) -> list[str]:
    """The names of 91, 90 or 80 rows of classes, "unused 12" for an id that COCO does not use; none
    for another number of rows."""
    if count == len(_NAMES):
        return COCO_NAMES
    if count not in (90, 91):
        return []
    return [_NAMES.get(index, f"unused {index}") for index in range(91 - count, 91)]


def count_classes(tensors: Mapping[str, Tensor], classes: ModelClasses) -> int | None:
    """How many classes `tensors` know, by the first of them that has rows of classes; None where
    none has."""
    for name, rows in classes.rows.items():
        if name in tensors and tensors[name].dim():
            return (len(tensors[name]) // rows.groups - rows.background) // rows.per_class
    return None


def keep_used_classes(
    tensors: Mapping[str, Tensor], names: list[str], classes: ModelClasses
) -> dict[str, Tensor]:
    """`tensors`, whose classes are `names`, with the rows of COCO's 80 classes alone. Those of
    other numbers of rows stay as they are."""
    places = {new: names.index(name) for new, name in enumerate(COCO_NAMES)}
    kept = dict(tensors)
    for name, rows in classes.rows.items():
        old = tensors.get(name)
        if old is not None and old.shape[:1] == (rows.count(len(names)),):
            fresh = old.new_zeros(rows.count(len(places)), *old.shape[1:])
            kept[name] = rows.moved(old, fresh, places)
    return kept
