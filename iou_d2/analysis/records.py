"""Detections beside the truth, as arrays: the one place that defines the "true IoU" of a detection.

Shapes: D detections, G ground-truth boxes. Boxes are XYXY in pixels of the original image, float64.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .reading import read_ground_truth, read_results


@dataclass(frozen=True)
class Records:
    """The detections of one results file, in the order of the file.

    Attributes:
        image_id: (D,) ids as in the ground truth, integers or strings.
        category_id: (D,) ids as in the ground truth.
        boxes: (D, 4) XYXY.
        score: (D,) the confidence that ranks the detections.
        cls_score: (D,) the class score; the confidence itself where a detector has no other.
        pred_iou: (D,) the predicted IoU in [0, 1], or None where a detector predicts none.
        centerness: (D,) the same of the centerness that FCOS and ATSS predict.
        true_iou: (D,) the highest IoU with a non-crowd ground truth of the detection's class in
            its image; 0 where there is none.
    """

    image_id: np.ndarray
    category_id: np.ndarray
    boxes: np.ndarray
    score: np.ndarray
    cls_score: np.ndarray
    pred_iou: np.ndarray | None
    true_iou: np.ndarray
    centerness: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.score)

    def signals(self) -> dict[str, np.ndarray]:
        """What may rank the boxes, by name: confidence, class score and, if any, predicted IoU or
        centerness."""
        signals = {"confidence": self.score, "cls_score": self.cls_score}
        if self.pred_iou is not None:
            signals["pred_iou"] = self.pred_iou
        if self.centerness is not None:
            signals["centerness"] = self.centerness
        return signals


def best_iou(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The highest IoU of each box with any ground-truth box.

    Args:
        boxes: (D, 4) XYXY.
        truth: (G, 4) XYXY.

    Returns:
        (D,) float64 in [0, 1]; zeros if G = 0. A box that is inverted, without area or not finite
        has IoU 0.
    """
    if len(truth) == 0:
        return np.zeros(len(boxes))
    with np.errstate(invalid="ignore", over="ignore"):
        top_left = np.maximum(boxes[:, None, :2], truth[None, :, :2])  # (D, G, 2)
        bottom_right = np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
        inter = np.clip(bottom_right - top_left, 0, None).prod(axis=2)  # (D, G)
        union = _area(boxes)[:, None] + _area(truth)[None, :] - inter
        valid = (union > 0) & np.isfinite(union)
        return np.divide(inter, union, out=np.zeros_like(union), where=valid).max(axis=1)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)


def make_records(ground_truth: dict, results: list[dict]) -> Records:
    """Put detections beside the ground truth.

    Args:
        ground_truth: a COCO dataset: "images", "categories" and "annotations", each of these with
            "image_id", "category_id", "bbox" as XYWH and, optionally, "iscrowd".
        results: COCO detections ("image_id", "category_id", "bbox" as XYWH, "score"), optionally
            with "cls_score", "pred_iou" and "centerness".

    Returns:
        Records; all arrays are empty if there are no detections.

    Raises:
        ValueError: a detection is of an image or a category that the ground truth lacks, a score
            is not finite, or only some detections have one of the optional keys.
        KeyError: a detection or an annotation lacks a required key.
    """
    check_ids(ground_truth, results)
    boxes = _xyxy([result["bbox"] for result in results])
    score = np.array([float(result["score"]) for result in results])
    if not np.isfinite(score).all():
        raise ValueError("A detection has a score that is not finite.")
    cls_score = _optional(results, "cls_score")
    return Records(
        image_id=np.array([result["image_id"] for result in results]),
        category_id=np.array([result["category_id"] for result in results]),
        boxes=boxes,
        score=score,
        cls_score=score if cls_score is None else cls_score,
        pred_iou=_optional(results, "pred_iou"),
        centerness=_optional(results, "centerness"),
        true_iou=_true_iou(ground_truth, results, boxes),
    )


def check_ids(ground_truth: dict, results: list[dict]) -> None:
    """Raise a ValueError for a detection of an image or category that the ground truth lacks."""
    for key, things in (("image_id", "images"), ("category_id", "categories")):
        known = {thing["id"] for thing in ground_truth[things]}
        for result in results:
            if result[key] not in known:
                raise ValueError(
                    f"A detection has {key} {result[key]!r}, which is not among the {things} of "
                    f"the ground truth."
                )


def _true_iou(ground_truth: dict, results: list[dict], boxes: np.ndarray) -> np.ndarray:
    """IoU of each detection with its best ground truth, one image and class at a time: (D,)."""
    truth = defaultdict(list)
    for ann in ground_truth["annotations"]:
        if not ann.get("iscrowd", 0):
            truth[ann["image_id"], ann["category_id"]].append(ann["bbox"])
    rows = defaultdict(list)
    for row, result in enumerate(results):
        rows[result["image_id"], result["category_id"]].append(row)

    true_iou = np.zeros(len(boxes))
    for group in rows.keys() & truth.keys():
        true_iou[rows[group]] = best_iou(boxes[rows[group]], _xyxy(truth[group]))
    return true_iou


def _xyxy(boxes_xywh: list) -> np.ndarray:
    boxes = np.array(boxes_xywh, dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _optional(results: list[dict], key: str) -> np.ndarray | None:
    count = sum(key in result for result in results)
    if count == 0:
        return None
    if count < len(results):
        raise ValueError(f'Only {count} of {len(results)} detections have the key "{key}".')
    return np.array([float(result[key]) for result in results])


def read_records(gt_path: str | os.PathLike, results_path: str | os.PathLike) -> Records:
    """`make_records` from a COCO ground-truth JSON and a results JSON, mended: see reading.py.

    Raises InputError or MissingFileError: a file is not what it should be, or the two do not belong
    together. The message names the file.
    """
    ground_truth = read_ground_truth(gt_path)
    return make_records(ground_truth, read_results(results_path, ground_truth))
