"""Which class is taken for which, at one score. Pure functions.

Shapes: D detections, K classes in order of their category id.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from .matching import FALSE, FOUND, IGNORED, Matches, box_iou


def best_f1_score(matches: Matches, scores: np.ndarray, objects: int) -> float:
    """The lowest score to keep so that F1 over all classes is highest, at the first threshold.

    Args:
        matches: of all detections.
        scores: (D,). objects: how many there are to find.

    Returns:
        One of the scores, the highest where several are as good; NaN if none finds an object.
    """
    outcome = matches.outcome[0]
    order = np.argsort(-scores, kind="stable")
    order = order[outcome[order] != IGNORED]
    found = outcome[order] == FOUND
    if not found.any():
        return float("nan")
    ranked = scores[order]
    f1 = 2 * np.cumsum(found) / (np.arange(1, len(found) + 1) + objects)
    ends = np.append(ranked[1:] < ranked[:-1], True)  # equal scores are kept or dropped together
    return float(ranked[np.where(ends, f1, -1).argmax()])


def confusion_matrix(
    ground_truth: dict, results: list[dict], matches: Matches, min_score: float, min_iou: float
) -> np.ndarray:
    """Count what objects are taken for.

    Detections that find an object of their class stand on the diagonal. Of the others, best first,
    each takes the free object of another class with the highest IoU, of at least `min_iou`; what
    then remains are false detections of nothing, and objects taken for nothing. Crowds, and what
    lies in them, do not count.

    Args:
        ground_truth, results: COCO dataset and COCO detections.
        matches: of `match_detections` at `min_iou` alone. min_score: of detections that count.

    Returns:
        (K + 1, K + 1) integers: rows are the true classes, columns what they are taken for, and the
        last of each is nothing. The very last count is 0.
    """
    place = {c: k for k, c in enumerate(sorted(c["id"] for c in ground_truth["categories"]))}
    nothing = len(place)
    matrix = np.zeros((nothing + 1, nothing + 1), dtype=np.int64)
    annotations, outcome, found = ground_truth["annotations"], *(array[0] for array in matches)
    kept = [row for row, result in enumerate(results) if result["score"] >= min_score]
    taken = {found[row] for row in kept if outcome[row] == FOUND}
    false, free = defaultdict(list), defaultdict(list)
    for row in sorted(kept, key=lambda row: -results[row]["score"]):
        k = place[results[row]["category_id"]]
        if outcome[row] == FOUND:
            matrix[k, k] += 1
        elif outcome[row] == FALSE:
            false[results[row]["image_id"]].append(results[row])
    for index, ann in enumerate(annotations):
        if index not in taken and not ann.get("iscrowd", 0):
            free[ann["image_id"]].append(ann)
    for image in false.keys() | free.keys():
        for truth, claimed in _pairs(false[image], free[image], min_iou):
            rows = nothing if truth is None else place[truth["category_id"]]
            matrix[rows, nothing if claimed is None else place[claimed["category_id"]]] += 1
    return matrix


def _pairs(detections: list[dict], objects: list[dict], min_iou: float):
    """(object, detection) of one image, None for nothing. Of one class are none that overlap so."""
    iou = box_iou(detections, objects, [0] * len(objects))
    for row, detection in enumerate(detections):
        best = int(iou[row].argmax()) if objects else -1
        taken = objects and iou[row, best] >= min_iou
        yield (objects[best] if taken else None), detection
        if taken:
            iou[:, best] = -1
    for column, annotation in enumerate(objects):
        if not len(detections) or iou[0, column] != -1:
            yield annotation, None
