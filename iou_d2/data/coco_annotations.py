"""Mend the annotations of a parsed COCO dict: ids, boxes and masks that have one meaning get COCO's
form.

Nothing given is changed; records that are right are shared, not copied. What has no single meaning
raises an InputError that names the file and the record, as `annotations[7] (id 42)`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from iou_d2.errors import InputError

from .cleaning import CLIPPED, NO_AREA, OVERSHOOT, Findings, clean_box
from .coco_boxes import doubt_about_boxes
from .coco_masks import good_keypoints, is_good_mask, mend_mask, turn
from .coco_mending import IDS, NUMBERS
from .coco_values import as_flag, as_id, as_number, short, where

FILLED_IN = {
    "id": "annotations without a positive integer id were given one",
    "area": "annotations without a positive area got that of their box",
    "iscrowd": "annotations without iscrowd got 0",
    "segmentation": "segmentations that are neither polygons nor RLE were left out",
    "keypoints": "keypoints that are no triples of numbers were left out",
}
FLAGS = "values of iscrowd that were no 0 or 1 were read as such"
SAME_ID = "annotations with the id of an earlier one were given another"
FLAT = "segmentations in one flat list or of strings were read as polygons"
TURNED = "turned boxes (CVAT's rotation) were replaced by the box around them"

_SELDOM = ("ignore", "attributes", "keypoints")

Size = tuple[int, int] | None  # width, height; None where nobody knows


class AnnotationMender:
    """Gives annotations all that COCOeval needs, and holds them against their images.

    COCOeval needs `area`, `iscrowd` and `id`, and takes id 0 for "no match".
    """

    def __init__(
        self,
        file: Path,
        annotations: Iterable[Any],
        sizes: dict[int, Size],
        categories: Container[int],
        findings: Findings,
    ) -> None:
        """`annotations` are all that will be mended, to be looked at for an id that is free."""
        self._file, self._annotations, self._findings = file, annotations, findings
        self._sizes, self._categories = sizes, categories
        self._seen: set[int] = set()
        self._next_id: int | None = None
        self._index = 0
        self._boxes, self._image_sizes = [np.zeros((0, 4))], [np.zeros((0, 2))]

    def mend(self, piece: Sequence[Any]) -> list[dict]:
        """The annotations that follow the last piece, without those that were dropped."""
        start = self._index
        mended = [self._mend_one(annotation) for annotation in piece]
        boxes, sizes = box_arrays(mended, self._sizes)
        self._boxes.append(boxes)
        self._image_sizes.append(sizes)
        return clip_boxes(mended, boxes, sizes, self._findings, start)

    def doubt(self) -> str | None:
        """What makes one doubt the boxes as they were before they were clipped."""
        return doubt_about_boxes(np.concatenate(self._boxes), np.concatenate(self._image_sizes))

    def _mend_one(self, annotation: Any) -> dict:
        index, self._index = self._index, self._index + 1
        if not _is_right(annotation, self._sizes, self._categories):
            annotation = _mend_annotation(
                self._file, index, annotation, self._sizes, self._categories, self._findings
            )
        if annotation["id"] in self._seen:
            self._findings.add(SAME_ID, where("annotations", index, annotation))
            annotation = {**annotation, "id": None}
        if annotation["id"] is None:
            if self._next_id is None:
                self._next_id = _first_free_id(self._annotations)
            annotation = {**annotation, "id": self._next_id}
            self._next_id += 1
        self._seen.add(annotation["id"])
        return annotation


def box_arrays(
    annotations: Sequence[dict], sizes: dict[int, Size]
) -> tuple[np.ndarray, np.ndarray]:
    """(N, 4) boxes XYWH, and (N, 2) sizes of their images, infinite where nobody knows them."""
    unknown = (float("inf"), float("inf"))
    sides = chain.from_iterable(a["bbox"] for a in annotations)
    image_sizes = chain.from_iterable(sizes[a["image_id"]] or unknown for a in annotations)
    return (
        np.fromiter(sides, dtype=np.float64).reshape(-1, 4),
        np.fromiter(image_sizes, dtype=np.float64).reshape(-1, 2),
    )


def clip_boxes(
    annotations: Sequence[dict],
    boxes: np.ndarray,
    sizes: np.ndarray,
    findings: Findings,
    start: int = 0,
) -> list[dict]:
    """Drop boxes without area or outside their image and clip the others: see `clean_box`.

    `boxes` and `sizes` are those of `box_arrays`. Crowd regions stay. `start` is the index of the
    first annotation in the file.
    """
    end = boxes[:, :2] + boxes[:, 2:]
    good = (boxes[:, :2] >= -OVERSHOOT) & (end <= sizes + OVERSHOOT) & (end > boxes[:, :2])
    good &= (boxes[:, :2] < sizes) & (end > 0)
    if good.all():
        return list(annotations)
    kept = []
    for index, is_good in enumerate(good.all(axis=1).tolist()):
        annotation = annotations[index]
        if is_good:
            kept.append(annotation)
            continue
        x, y, w, h = annotation["bbox"]
        if np.isinf(sizes[index]).any():
            box, finding = ((x, y, x + w, y + h), None) if min(w, h) > 0 else (None, NO_AREA)
        else:
            box, finding = clean_box((x, y, x + w, y + h), *map(int, sizes[index]))
        if finding is not None:
            findings.add(finding, where("annotations", start + index, annotation))
        if box is not None:
            kept.append(_with_box(annotation, box) if finding == CLIPPED else annotation)
    return kept


def _first_free_id(annotations: Iterable[Any]) -> int:
    """A positive id above all that are given."""
    ids = (as_id(a.get("id")) for a in annotations if isinstance(a, dict))
    return max(max((i for i in ids if i is not None), default=0) + 1, 1)


def _is_right(a: Any, sizes: dict[int, Size], categories: Container[int]) -> bool:
    """Whether there is nothing to mend. This is all that most annotations go through."""
    try:
        box, area = a["bbox"], a["area"]
        x, y, w, h = box
        return (
            type(a["id"]) is int
            and 0 < a["id"] < 2**63
            and type(a["image_id"]) is int
            and a["image_id"] in sizes
            and type(a["category_id"]) is int
            and a["category_id"] in categories
            and type(box) is list
            and abs(x) + abs(y) + abs(w) + abs(h) < 1e12
            and type(area) in (int, float)
            and 0 < area < 1e12
            and type(a["iscrowd"]) is int
            and a["iscrowd"] in (0, 1)
            and a.keys().isdisjoint(_SELDOM)
            and is_good_mask(a.get("segmentation"), sizes[a["image_id"]])
        )
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        return False


def _mend_annotation(
    file: Path,
    index: int,
    annotation: Any,
    sizes: dict[int, Size],
    categories: Container[int],
    findings: Findings,
) -> dict:
    """One annotation; its `id` is None where it needs a new one."""
    if not isinstance(annotation, dict):
        raise InputError(f"{file}: annotations[{index}] is not a dict.")
    place = where("annotations", index, annotation)
    if isinstance(annotation.get("id"), (list, dict)):
        raise InputError(
            f"{file}: {place} has the id {short(annotation['id'])}, which is not an integer."
        )
    changed = _references(annotation, f"{file}: {place}", sizes, categories)
    if changed.keys() & {"image_id", "category_id"}:
        findings.add(IDS, place)
    box = _numbers(annotation.get("bbox"))
    if box is None:
        raise InputError(
            f"{file}: {place} needs a bbox of four finite numbers [x, y, width, height], not "
            f"{short(annotation.get('bbox'))}."
        )
    if box != annotation["bbox"]:
        findings.add(NUMBERS, place)
        changed["bbox"] = box
    annotation = {**annotation, **changed} if changed else annotation
    changed = _flag(annotation, f"{file}: {place}", findings, place)
    changed |= _mask(annotation, sizes[annotation["image_id"]], findings, place)
    changed |= _area_and_id(annotation, findings, place)
    annotation = {**annotation, **changed} if changed else annotation
    turned = turn(annotation)
    if turned is not None:
        findings.add(TURNED, place)
    return annotation if turned is None else turned


def _references(
    annotation: dict, place: str, sizes: Container[int], categories: Container[int]
) -> dict[str, int]:
    """The ids of image and category where they were not integers."""
    changed = {}
    for key, known, kind in (
        ("image_id", sizes, "images"),
        ("category_id", categories, "categories"),
    ):
        value = annotation.get(key)
        number = as_id(value)
        if number is None or number not in known:
            raise InputError(f"{place} has {key} {short(value)}, which is not among the {kind}.")
        if type(value) is not int:
            changed[key] = number
    if annotation.get("ignore") not in (None, 0, False, "0", "false", ""):
        raise InputError(
            f"{place} is marked 'ignore', which Detectron2 does not support: use iscrowd = 1."
        )
    return changed


def _numbers(box: Any) -> list[int | float] | None:
    if not isinstance(box, list) or len(box) != 4:
        return None
    numbers = [as_number(value) for value in box]
    return None if None in numbers else numbers


def _flag(annotation: dict, place: str, findings: Findings, record: str) -> dict[str, int]:
    if "iscrowd" not in annotation:
        findings.add(FILLED_IN["iscrowd"], record)
        return {"iscrowd": 0}
    value = annotation["iscrowd"]
    flag = as_flag(value)
    if flag is None:
        raise InputError(f"{place} needs an iscrowd of 0 or 1, not {short(value)}.")
    if type(value) is int:
        return {}
    findings.add(FLAGS, record)
    return {"iscrowd": flag}


def _mask(annotation: dict, size: Size, findings: Findings, record: str) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    value = annotation.get("segmentation")
    # Detectron2 would leave out the whole object, which a box detector can do without a mask.
    if not is_good_mask(value, size):
        polygons = mend_mask(value)
        findings.add(FILLED_IN["segmentation"] if polygons is None else FLAT, record)
        changed["segmentation"] = polygons or []
    if not good_keypoints(annotation.get("keypoints")):
        findings.add(FILLED_IN["keypoints"], record)
        changed["keypoints"] = []
    if annotation.get("ignore", 0) not in (0, False):
        changed["ignore"] = 0
    return changed


def _area_and_id(annotation: dict, findings: Findings, record: str) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    area = annotation.get("area")
    number = as_number(area)
    if number is None or number <= 0:
        findings.add(FILLED_IN["area"], record)
        changed["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    elif isinstance(area, str):
        findings.add(NUMBERS, record)
        changed["area"] = number
    value = annotation.get("id")
    number = as_id(value)
    if number is None or number <= 0:
        findings.add(FILLED_IN["id"], record)
        changed["id"] = None
    elif type(value) is not int:
        findings.add(IDS, record)
        changed["id"] = number
    return changed


def _with_box(annotation: dict, box: tuple[float, float, float, float]) -> dict:
    x0, y0, x1, y1 = box
    area = min(annotation["area"], (x1 - x0) * (y1 - y0))
    return {**annotation, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": area}
