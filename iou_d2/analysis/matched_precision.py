"""COCO's average precision from matches, where images have weights or outcomes are changed: what
its own counters cannot do. With neither it is their number (a test).

Shapes: D detections by falling score, F of them that find an object, R = 101 recall levels.
"""

from __future__ import annotations

import numpy as np

RECALL_LEVELS = np.linspace(0, 1, 101)


def interpolated_precision(
    found: np.ndarray, weight: np.ndarray, counted: np.ndarray, objects: float
) -> np.ndarray:
    """Precision of one class at each recall level.

    Only finds can raise it, so that all else enters by `counted` alone.

    Args:
        found: (F,) places of the detections that find an object, rising.
        weight: (D,) how often each detection counts.
        counted: (D,) running sum of what counts down to each, finds and false ones.
        objects: how many there are to find, weighted alike; above 0.

    Returns:
        (R,) in [0, 1]; 0 where a recall is not reached.
    """
    true = np.cumsum(weight[found], dtype=np.float64)
    down_to = counted[found]
    precision = np.divide(true, down_to, out=np.zeros(len(true)), where=down_to > 0)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(true / objects, RECALL_LEVELS, side="left")
    return np.append(precision, 0.0)[places]


def falling_order(ground_truth: dict, results: list[dict]) -> np.ndarray:
    """(D,) rows of `results` by falling score; equal ones by image, as COCO merges images."""
    number = image_numbers(ground_truth)
    images = [number[result["image_id"]] for result in results]
    return np.lexsort((images, [-result["score"] for result in results]))


def image_numbers(ground_truth: dict) -> dict:
    """Image id -> its place among the sorted ids."""
    return {id_: n for n, id_ in enumerate(sorted(i["id"] for i in ground_truth["images"]))}
