"""Which detection finds which object, as COCO counts: where curves, errors and tests start.

Shapes: T IoU thresholds, D detections, G annotations.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask

from .records import check_ids

FALSE, FOUND, IGNORED = 0, 1, 2
_LARGEST_AREA = 1e5**2  # of boxes that COCO counts, in pixels


class Matches(NamedTuple):
    """What became of each detection at each IoU threshold.

    Attributes:
        outcome: (T, D) FOUND an object, FALSE, or IGNORED because it lies in a crowd or has no area
            that COCO counts.
        found: (T, D) index of the annotation that it found, -1 for none.
    """

    outcome: np.ndarray
    found: np.ndarray


def match_detections(
    ground_truth: dict, results: list[dict], thresholds: Sequence[float]
) -> Matches:
    """Match all detections with the objects of their class and image.

    An object is found once: the detections of a class in an image, best first, take of the objects
    still free the one with the highest IoU, of at least the threshold, and of equal ones the last.
    The others are false, but for those of which at least that share lies in a crowd, and those of
    an area below 0 or above 1e10 pixels, which do not count.

    Args:
        ground_truth, results: COCO dataset and COCO detections, see `make_records`.
        thresholds: T IoUs above 0.

    Raises ValueError: a detection is of an image or a category that the ground truth lacks.
    """
    check_ids(ground_truth, results)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    annotations = ground_truth["annotations"]
    objects, rows = defaultdict(list), defaultdict(list)
    for index, ann in enumerate(annotations):
        objects[ann["image_id"], ann["category_id"]].append(index)
    for row in np.argsort([-result["score"] for result in results], kind="stable").tolist():
        rows[results[row]["image_id"], results[row]["category_id"]].append(row)

    outcome = np.full((len(thresholds), len(results)), FALSE, dtype=np.int8)
    found = np.full(outcome.shape, -1)
    for key in rows.keys() & objects.keys():
        indices, of_key = np.array(objects[key]), rows[key]
        crowd = [annotations[index].get("iscrowd", 0) for index in indices]
        iou = box_iou([results[row] for row in of_key], [annotations[i] for i in indices], crowd)
        outcome[:, of_key], place = _match(iou, np.array(crowd, dtype=bool), thresholds)
        found[:, of_key] = np.where(place >= 0, indices[place], -1)
    outcome[(outcome == FALSE) & _has_odd_area(results)] = IGNORED
    return Matches(outcome, found)


def _has_odd_area(results: list[dict]) -> np.ndarray:
    """(D,) bool: outside of the range that COCO calls "all"."""
    areas = np.array([result["bbox"][2] * result["bbox"][3] for result in results], np.float64)
    return (areas < 0) | (areas > _LARGEST_AREA)


def best_of_each_image(results: list[dict], max_dets: int) -> list[dict]:
    """The `max_dets` best detections of each image and class, which are all that COCO counts, in
    the order of `results`."""
    if len(results) <= max_dets:
        return results
    seen = Counter()
    kept = []
    for row in np.argsort([-result["score"] for result in results], kind="stable").tolist():
        key = results[row]["image_id"], results[row]["category_id"]
        seen[key] += 1
        if seen[key] <= max_dets:
            kept.append(row)
    return [results[row] for row in sorted(kept)]


def box_iou(detections: list[dict], annotations: list[dict], crowd: Sequence[int]) -> np.ndarray:
    """(D, G) IoU of "bbox" with "bbox"; of a crowd, the share of the detection that lies in it."""
    if not (detections and annotations):
        return np.zeros((len(detections), len(annotations)))
    boxes = [np.array([x["bbox"] for x in side], np.float64) for side in (detections, annotations)]
    return mask.iou(*boxes, [int(bool(value)) for value in crowd])


def _match(
    iou: np.ndarray, crowd: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """IoUs (D, G) of detections, best first, and which (G,) are crowds -> outcomes (T, D), and the
    column of the object that each found, -1 for none."""
    free = np.tile(~crowd, (len(thresholds), 1))  # (T, G)
    steps, last = np.arange(len(thresholds)), len(crowd) - 1
    outcome = np.full((len(thresholds), len(iou)), FALSE, dtype=np.int8)
    place = np.full(outcome.shape, -1)
    # The others reach no threshold, and they are most.
    for row in np.flatnonzero(iou.max(axis=1) >= thresholds.min()).tolist():
        candidates = np.where(free, iou[row], -1)
        best = last - candidates[:, ::-1].argmax(axis=1)  # of equal IoUs the last one
        finds = candidates[steps, best] >= thresholds
        free[steps[finds], best[finds]] = False
        in_crowd = iou[row, crowd].max(initial=-1) >= thresholds
        outcome[:, row] = np.where(finds, FOUND, np.where(in_crowd, IGNORED, FALSE))
        place[finds, row] = best[finds]
    return outcome, place
