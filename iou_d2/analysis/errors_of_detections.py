"""What is wrong with each false detection and each object not found, and what it costs: the error
types of TIDE (Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors, 2020).

Sec. 2.2 defines the types, by the foreground threshold 0.5 and the background threshold 0.1. Where
a detection would be of two types, and where one object could be gained by several detections, it
goes as in the authors' `tidecv`, which is not maintained since 2020 and so is only a peer of the
tests. Classes are averaged as COCO does, over those with objects; there `tidecv` also counts an AP
of 0 for a class with detections alone. What lies in a crowd is no error.

Shapes: D detections, G annotations.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from .matched_precision import falling_order, interpolated_precision
from .matching import FALSE, FOUND, IGNORED, Matches, box_iou, match_detections

FOREGROUND, BACKGROUND_IOU = 0.5, 0.1

CLASS, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED = ERROR_TYPES = (
    "class",
    "localisation",
    "both",
    "duplicate",
    "background",
    "missed",
)


class DetectionErrors(NamedTuple):
    """Attributes:
    kind: (D,) str, of ERROR_TYPES, "found" or "ignored".
    target: (D,) the annotation that a class or localisation error is about, else -1.
    found: (D,) the annotation that was found, else -1.
    missed: (G,) bool, objects that no detection finds nor would find without its error.
    unfound: (G,) bool, objects that no detection finds.
    """

    kind: np.ndarray
    target: np.ndarray
    found: np.ndarray
    missed: np.ndarray
    unfound: np.ndarray


def find_errors(
    ground_truth: dict, results: list[dict], matches: Matches | None = None
) -> DetectionErrors:
    """The error type of each detection and of each object.

    Args:
        ground_truth, results: COCO dataset and COCO detections, see `make_records`. `results` hold
            what counts: TIDE takes the 100 best detections of an image.
        matches: of `match_detections` at FOREGROUND alone; made here where they are not given.

    Raises ValueError: a detection is of an image or a category that the ground truth lacks.
    """
    annotations = ground_truth["annotations"]
    matches = matches or match_detections(ground_truth, results, [FOREGROUND])
    outcome, found = matches.outcome[0], matches.found[0]
    names = {FALSE: BACKGROUND, FOUND: "found", IGNORED: "ignored"}
    kind = np.array([names[value] for value in outcome.tolist()], dtype=object)
    target = np.full(len(results), -1)
    objects, false = defaultdict(list), defaultdict(list)
    for index, ann in enumerate(annotations):
        if not ann.get("iscrowd", 0):
            objects[ann["image_id"]].append(index)
    for row in np.flatnonzero(outcome == FALSE).tolist():
        false[results[row]["image_id"]].append(row)
    for image in false.keys() & objects.keys():
        rows, indices = false[image], objects[image]
        truth, claimed = [annotations[i] for i in indices], [results[row] for row in rows]
        iou = box_iou(claimed, truth, [0] * len(truth))
        same = np.array([[c["category_id"] == t["category_id"] for t in truth] for c in claimed])
        kind[rows], column = _kinds(iou, same)
        target[rows] = np.where(column >= 0, np.array(indices)[column], -1)

    unfound = np.array([not ann.get("iscrowd", 0) for ann in annotations], dtype=bool)
    unfound[found[found >= 0]] = False
    missed = unfound.copy()
    missed[target[target >= 0]] = False
    return DetectionErrors(kind, target, found, missed, unfound)


def _kinds(iou: np.ndarray, same: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Types of the false detections of an image, and the column of the object that each is about.

    Args:
        iou: (D, G) with G > 0. same: (D, G) whether both are of one class.
    """
    best_same, best_other = (iou * same).max(axis=1), (iou * ~same).max(axis=1)
    kinds, columns = [], np.full(len(iou), -1)
    for row, (of_same, of_other) in enumerate(zip(best_same, best_other)):
        if BACKGROUND_IOU <= of_same < FOREGROUND:
            kinds.append(LOCALISATION)
            columns[row] = (iou[row] * same[row]).argmax()
        elif of_other >= FOREGROUND:
            kinds.append(CLASS)
            columns[row] = (iou[row] * ~same[row]).argmax()
        elif of_same >= FOREGROUND:
            kinds.append(DUPLICATE)
        else:
            kinds.append(BACKGROUND if of_other <= BACKGROUND_IOU else BOTH)
    return kinds, columns


class ErrorTable(NamedTuple):
    """Attributes:
    ap50: in percent, NaN without objects.
    count: error type -> how many.
    gain: error type -> what AP50 gains, in points, where all errors of the type alone are mended
        (dAP); also of "false positives" and of "false negatives" without regard to type.
    """

    ap50: float
    count: dict[str, int]
    gain: dict[str, float]


def weigh_errors(ground_truth: dict, results: list[dict], errors: DetectionErrors) -> ErrorTable:
    """What each error type costs.

    A class or localisation error becomes a find where its object is not found and no better scored
    error is about it, and goes otherwise; duplicates, background and both go; a missed object is no
    longer to be found. A gain below 0, which interpolation can give, is 0.
    """
    order = falling_order(ground_truth, results)
    truth = _Truth(ground_truth, order)
    category = truth.places(results)
    found, counts = errors.kind == "found", errors.kind != "ignored"
    ap50 = truth.ap(category, found, counts)
    best = _best_of_each_object(errors, order)
    count, gain = {}, {}
    for kind in ERROR_TYPES:
        if kind == MISSED:
            count[kind] = int(errors.missed.sum())
            gain[kind] = truth.ap(category, found, counts, errors.missed) - ap50
            continue
        wrong = errors.kind == kind
        count[kind] = int(wrong.sum())
        mended = wrong & best
        of_mended = category.copy()
        of_mended[mended] = truth.category[errors.target[mended]]
        gain[kind] = truth.ap(of_mended, found | mended, counts & (~wrong | mended)) - ap50
    gain["false positives"] = truth.ap(category, found, found) - ap50
    gain["false negatives"] = truth.ap(category, found, counts, errors.unfound) - ap50
    return ErrorTable(ap50, count, {kind: float(np.maximum(x, 0)) for kind, x in gain.items()})


def _best_of_each_object(errors: DetectionErrors, order: np.ndarray) -> np.ndarray:
    """(D,) bool: the best scored error about each object that is not found."""
    best = np.zeros(len(order), dtype=bool)
    claimed = set()
    for row in order.tolist():
        target = int(errors.target[row])
        if target >= 0 and errors.unfound[target] and target not in claimed:
            claimed.add(target)
            best[row] = True
    return best


class _Truth:
    """Counts AP50 of outcomes, in percent.

    Attributes:
        category: (G,) place of the class of each annotation.
    """

    def __init__(self, ground_truth: dict, order: np.ndarray):
        self._order = order
        self._place = {c["id"]: place for place, c in enumerate(ground_truth["categories"])}
        self.category = self.places(ground_truth["annotations"])
        crowd = [bool(a.get("iscrowd", 0)) for a in ground_truth["annotations"]]
        self._objects = ~np.array(crowd, dtype=bool)

    def places(self, records: list[dict]) -> np.ndarray:
        """The place of the class of each of them, an integer."""
        return np.array([self._place[r["category_id"]] for r in records], dtype=np.int64)

    def ap(
        self,
        category: np.ndarray,
        found: np.ndarray,
        counts: np.ndarray,
        without: np.ndarray | None = None,
    ) -> float:
        """`without`: (G,) bool, objects that are not to be found."""
        objects = self._objects if without is None else self._objects & ~without
        category, found, counts = (array[self._order] for array in (category, found, counts))
        values = []
        for place in np.unique(self.category[self._objects]).tolist():
            of, number = category == place, int((self.category[objects] == place).sum())
            if number:
                places, counted = np.flatnonzero(found[of]), np.cumsum(counts[of])
                one = np.ones(len(counted))
                values.append(interpolated_precision(places, one, counted, number).mean())
            else:
                values.append(0.0)
        return 100 * float(np.mean(values)) if values else float("nan")
