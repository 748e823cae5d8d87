"""Curves that compare detectors: recall against false positives, a metric against iteration.

Shapes: D detections, E evaluations. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .matching import FOUND, IGNORED, match_detections


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


def metric_by_iteration(
    lines: Iterable[dict], metric: str, max_iter: int
) -> tuple[np.ndarray, np.ndarray]:
    """A metric from the lines of a metrics.json: (E,) iterations done, rising, and (E,) values.

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
