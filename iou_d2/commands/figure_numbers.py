"""The numbers of `iou-d2 figures`, from COCO detections. NaN becomes None, as JSON has it."""

from __future__ import annotations

import math

import numpy as np

from iou_d2.analysis.average_precision import (
    ap_by_iou,
    coco_precision,
    coco_precision_recall,
    summarize_ap,
)
from iou_d2.analysis.rivals import (
    Nearest,
    Rivals,
    find_rivals,
    nearest_objects,
    paths_on_objects,
    summarize_rivals,
)

# Of the bins of IoUs with the object. The last one holds 1.
EDGES = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
METRICS = ("AP", "AP50", "AP75", "AP90")


def variant_numbers(truth: dict, rows: list[dict], limit: int) -> dict:
    """Of what an NMS leaves: "boxes" an image, those by IoU with their object, "recall" in percent
    at the thresholds of COCO over all of them, and AP of the `limit` best an image and class."""
    images = len(truth["images"])
    counts, _ = np.histogram(nearest_objects(truth, rows).iou, bins=EDGES)
    _, recall = coco_precision_recall(truth, rows, max_dets=max(limit, len(rows)))
    table = summarize_ap(coco_precision(truth, rows, max_dets=limit), [])
    return {
        "boxes": len(rows) / images,
        "boxes_by_iou": (counts / images).tolist(),
        "recall": defined(ap_by_iou(recall)),
        **{metric: defined(table[metric]) for metric in METRICS},
    }


def rivals_of(truth: dict, candidates: list[dict]) -> tuple[Nearest, Rivals]:
    """Rivals by class score and by predicted IoU, or by the true one where none is predicted."""
    nearest = nearest_objects(truth, candidates)
    score = np.array([x.get("cls_score", x["score"]) for x in candidates])
    predicted = np.array([x.get("pred_iou", iou) for x, iou in zip(candidates, nearest.iou)])
    return nearest, find_rivals(nearest, score, predicted)


def rivals_numbers(truth: dict, candidates: list[dict]) -> dict:
    """Of objects with two candidates or more: see `summarize_rivals`; "signal" says what it is."""
    nearest, rivals = rivals_of(truth, candidates)
    signal = "predicted IoU" if candidates and "pred_iou" in candidates[0] else "true IoU"
    table = summarize_rivals(rivals, nearest.iou)
    return {"signal": signal, **{name: defined(value) for name, value in table.items()}}


def refinement_numbers(
    truth: dict, steps: list[list[dict]], paths: list[dict], limit: int
) -> dict[str, list]:
    """For 0, 1, ... steps the AP of the detector, and the mean "true_iou" and "predicted_iou" of
    boxes that began on an object with an IoU of at least 0.5."""
    tables = [summarize_ap(coco_precision(truth, rows, max_dets=limit), []) for rows in steps]
    numbers = {metric: [defined(table[metric]) for table in tables] for metric in METRICS}
    on_objects = paths_on_objects(truth, paths)
    for name, values in (("true_iou", on_objects.true), ("predicted_iou", on_objects.predicted)):
        means = values.mean(axis=0) if len(values) else np.full(len(steps), math.nan)
        numbers[name] = defined(means)
    return {**numbers, "boxes_on_objects": len(on_objects.row)}


def defined(value):
    """A number or an array as JSON has it."""
    if isinstance(value, np.ndarray):
        return [defined(x) for x in value.tolist()]
    return None if isinstance(value, float) and math.isnan(value) else value
