"""Curves that compare detectors: recall against false positives, a metric against iteration.

Shapes: D detections, E evaluations. Pure functions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from .matching import FOUND, IGNORED, match_detections


def same_truth(one: dict, other: dict) -> bool:
    """Whether two COCO datasets have the same images and the same objects, in any order. Categories
    without objects do not count."""

    def objects(truth: dict) -> list:
        return sorted(
            (str(a["image_id"]), str(a["category_id"]), list(a["bbox"]), a.get("iscrowd", 0))
            for a in truth["annotations"]
        )

    images = [sorted(str(image["id"]) for image in truth["images"]) for truth in (one, other)]
    return images[0] == images[1] and objects(one) == objects(other)


def recall_by_false_positives(
    ground_truth: dict, results: list[dict], min_iou: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """The curve that FDDB draws ("discrete ROC"), from all detections by falling score.

    An object is found once, as COCO counts: see `match_detections`.

    Args:
        ground_truth, results: COCO dataset and COCO detections, see `make_records`.
        min_iou: of a detection that finds its object.

    Returns:
        false_positives: (D',) rising, their number down to each detection that counts.
        recall: (D',) rising, the share of the objects found by then; NaN without objects.

    Raises:
        ValueError: a detection is of an image or a category that the ground truth lacks.
    """
    order = np.argsort([-result["score"] for result in results], kind="stable")
    outcome = match_detections(ground_truth, results, [min_iou]).outcome[0, order]
    found = outcome[outcome != IGNORED] == FOUND
    objects = sum(not ann.get("iscrowd", 0) for ann in ground_truth["annotations"])
    recall = np.cumsum(found) / objects if objects else np.full(len(found), np.nan)
    return np.cumsum(~found), recall


def is_iteration(value: Any) -> bool:
    """Whether a value of a JSON file is a whole number, of a size that iterations have."""
    return type(value) in (int, float) and abs(value) < 2**53 and value == int(value)


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number that a float holds, NaN and infinity included."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def metric_by_iteration(
    lines: Iterable[dict], metric: str, max_iter: int
) -> tuple[np.ndarray, np.ndarray]:
    """A metric from the lines of a metrics.json: (E,) iterations done, rising, and (E,) values.

    Takes lines of which `is_iteration` and `is_number` hold where they have the two keys.

    Detectron2 counts iterations from 0 while it trains, and logs what comes after the last one as
    `max_iter`. A run that was resumed may have logged an iteration twice: the last value counts.
    """
    values = {
        min(line["iteration"] + 1, max_iter): line[metric]
        for line in lines
        if "iteration" in line and metric in line
    }
    iterations = np.array(sorted(values), dtype=np.int64)
    return iterations, np.array([values[i] for i in iterations.tolist()], dtype=np.float64)
