"""Boxes on the same object: which of them a score picks, and how well that one fits.

Shapes: D detections, P objects with rivals, T steps. Pure functions.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from .matching import box_iou
from .records import best_iou


class Nearest(NamedTuple):
    """
    Attributes:
        annotation: (D,) index of the object of a detection's class and image that it overlaps most,
            crowds left out; -1 where it overlaps none.
        iou: (D,) with it, the true IoU of Records.
    """

    annotation: np.ndarray
    iou: np.ndarray


def nearest_objects(ground_truth: dict, results: list[dict]) -> Nearest:
    """The object of each COCO detection; of equal IoUs the first."""
    annotations = ground_truth["annotations"]
    objects, rows = defaultdict(list), defaultdict(list)
    for index, annotation in enumerate(annotations):
        if not annotation.get("iscrowd", 0):
            objects[annotation["image_id"], annotation["category_id"]].append(index)
    for row, result in enumerate(results):
        rows[result["image_id"], result["category_id"]].append(row)

    nearest = Nearest(np.full(len(results), -1), np.zeros(len(results)))
    for key in rows.keys() & objects.keys():
        indices, of_key = np.array(objects[key]), rows[key]
        sides = [results[row] for row in of_key], [annotations[index] for index in indices]
        iou = box_iou(*sides, crowd=[0] * len(indices))
        nearest.iou[of_key] = iou.max(axis=1)
        best = indices[iou.argmax(axis=1)]
        nearest.annotation[of_key] = np.where(iou.max(axis=1) > 0, best, -1)
    return nearest


class Rivals(NamedTuple):
    """For each of the objects with two boxes or more, rows (P,) of detections.

    Attributes:
        annotation: index of the object, rising.
        by_score: that of the highest score.
        by_signal: that of which another signal is highest.
        best: the one that fits best.
    """

    annotation: np.ndarray
    by_score: np.ndarray
    by_signal: np.ndarray
    best: np.ndarray


def find_rivals(
    nearest: Nearest, score: np.ndarray, signal: np.ndarray, min_iou: float = 0.5
) -> Rivals:
    """The rivals among detections, of which `score` and `signal` (D,) are given.

    Boxes whose IoU with their object is at least `min_iou` are rivals for it; of equal values the
    first wins.
    """
    chosen = np.flatnonzero((nearest.iou >= min_iou) & (nearest.annotation >= 0))
    objects, counts = np.unique(nearest.annotation[chosen], return_counts=True)
    objects = objects[counts > 1]
    firsts = [
        _highest(values, nearest.annotation, chosen) for values in (score, signal, nearest.iou)
    ]
    rows = [np.array([first[o] for o in objects.tolist()], dtype=np.int64) for first in firsts]
    return Rivals(objects, *rows)


def _highest(values: np.ndarray, objects: np.ndarray, chosen: np.ndarray) -> dict[int, int]:
    """Object -> which row of `chosen` has the highest of `values`."""
    falling = chosen[np.argsort(-values[chosen], kind="stable")]
    first: dict[int, int] = {}
    for row, object_ in zip(falling.tolist(), objects[falling].tolist()):
        first.setdefault(object_, row)
    return first


def summarize_rivals(rivals: Rivals, iou: np.ndarray) -> dict[str, float | int]:
    """How many objects have rivals; the mean IoU of the boxes that score and signal pick, and of
    the best; and for how many objects the signal picks a better or a worse box than the score. NaN
    without any."""
    picked = {name: iou[getattr(rivals, name)] for name in ("by_score", "by_signal", "best")}
    some = len(rivals.annotation) > 0
    table: dict[str, float | int] = {"objects": len(rivals.annotation)}
    for name, values in picked.items():
        table[f"iou_{name}"] = float(values.mean()) if some else float("nan")
    gain = picked["by_signal"] - picked["by_score"]
    return {**table, "better": int((gain > 0).sum()), "worse": int((gain < 0).sum())}


class ObjectPaths(NamedTuple):
    """The paths of boxes that begin on an object.

    Attributes:
        row: (P,) of the paths.
        annotation: (P,) index of their object, to which they are compared at every step.
        true: (P, T + 1) IoU with it after 0, 1, ... T steps.
        predicted: (P, T + 1) predicted IoU.
    """

    row: np.ndarray
    annotation: np.ndarray
    true: np.ndarray
    predicted: np.ndarray


def paths_on_objects(ground_truth: dict, paths: list[dict], min_iou: float = 0.5) -> ObjectPaths:
    """The paths of which the first box has an IoU of at least `min_iou` with its object.

    Args:
        paths: COCO detections, of the first boxes, that also hold T + 1 "boxes" XYXY and their
            "pred_ious".
    """
    nearest = nearest_objects(ground_truth, paths)
    rows = np.flatnonzero(nearest.iou >= min_iou)
    length = len(paths[0]["boxes"]) if paths else 0
    true, predicted = np.zeros((len(rows), length)), np.zeros((len(rows), length))
    for place, row in enumerate(rows.tolist()):
        x, y, w, h = ground_truth["annotations"][nearest.annotation[row]]["bbox"]
        boxes = np.array(paths[row]["boxes"], dtype=np.float64)
        true[place] = best_iou(boxes, np.array([[x, y, x + w, y + h]], dtype=np.float64))
        predicted[place] = paths[row]["pred_ious"]
    return ObjectPaths(rows, nearest.annotation[rows], true, predicted)
