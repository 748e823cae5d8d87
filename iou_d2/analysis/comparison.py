"""Curves that compare detectors: recall against false positives, a metric against iteration.

Shapes: D detections, E evaluations. Pure functions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from pycocotools import mask

from .records import check_ids

_FALSE, _FOUND, _IGNORED = 0, 1, 2


def recall_by_false_positives(
    ground_truth: dict, results: list[dict], min_iou: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """The curve that FDDB draws ("discrete ROC"), from all detections by falling score.

    An object is found once, as COCO counts: the detections of a class in an image, best first, take
    of the objects still free the one with the highest IoU, of at least `min_iou`. The others are
    false, but for those of which at least that share lies in a crowd, which do not count.

    Args:
        ground_truth, results: COCO dataset and COCO detections, see `make_records`.
        min_iou: of a detection that finds its object.

    Returns:
        false_positives: (D',) rising, their number down to each detection that counts.
        recall: (D',) rising, the share of the objects found by then; NaN without objects.

    Raises:
        ValueError: a detection is of an image or a category that the ground truth lacks.
    """
    check_ids(ground_truth, results)
    truth, rows = defaultdict(list), defaultdict(list)
    for ann in ground_truth["annotations"]:
        truth[ann["image_id"], ann["category_id"]].append(ann)
    order = np.argsort([-result["score"] for result in results], kind="stable")
    for row in order.tolist():
        rows[results[row]["image_id"], results[row]["category_id"]].append(row)

    outcome = np.full(len(results), _FALSE)
    for key in rows.keys() & truth.keys():
        crowd = [ann.get("iscrowd", 0) for ann in truth[key]]
        # Of a crowd this is the share of the detection that lies in it.
        iou = mask.iou(
            np.array([results[row]["bbox"] for row in rows[key]], dtype=np.float64),
            np.array([ann["bbox"] for ann in truth[key]], dtype=np.float64),
            crowd,
        )
        outcome[rows[key]] = _match(iou, np.array(crowd, dtype=bool), min_iou)

    outcome = outcome[order]
    found = outcome[outcome != _IGNORED] == _FOUND
    objects = sum(not ann.get("iscrowd", 0) for ann in ground_truth["annotations"])
    recall = np.cumsum(found) / objects if objects else np.full(len(found), np.nan)
    return np.cumsum(~found), recall


def _match(iou: np.ndarray, crowd: np.ndarray, min_iou: float) -> np.ndarray:
    """IoUs (D, G) of detections, best first, and which (G,) are crowds -> outcomes (D,)."""
    free = ~crowd
    outcome = np.full(len(iou), _FALSE)
    for row, of_row in enumerate(iou):
        candidates = np.where(free, of_row, -1)
        if candidates.max() >= min_iou:
            free[candidates.argmax()] = False
            outcome[row] = _FOUND
        elif (of_row[crowd] >= min_iou).any():
            outcome[row] = _IGNORED
    return outcome


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
