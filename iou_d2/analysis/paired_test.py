"""Whether one detector is better than another on the same images, or only luckier with them.

The paired bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 16): images
are drawn anew with replacement, the same ones for both detectors, and AP is counted on each draw.
It says how much the difference hangs on the test images; nothing of other seeds of the training.
Of trainings with several seeds it is the mean difference that is drawn anew.

Shapes: T = 10 IoU thresholds, D detections of a class, I images, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .average_precision import IOU_THRESHOLDS
from .matched_precision import falling_order, image_numbers, interpolated_precision
from .matching import FOUND, IGNORED, match_detections

METRICS = ("AP", "AP50", "AP75")


class Difference(NamedTuple):
    """Of a metric in percent, second detector minus first.

    Attributes:
        value: on the images as they are.
        low, high: the middle 95 % of the draws.
        p: two-sided, twice the share of the draws on the other side of 0; at least 2 / (B + 1).
    """

    value: float
    low: float
    high: float
    p: float


class _Class(NamedTuple):
    found: list[np.ndarray]  # for each threshold the places of those that find an object
    ignored: np.ndarray  # (T, D) bool, by falling score
    image: np.ndarray  # (D,) place of its image
    objects: np.ndarray  # (I,) in each image


def paired_bootstrap(
    ground_truth: dict,
    pairs: Sequence[tuple[list[dict], list[dict]]],
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """AP, AP50 and AP75 of the second detector of a pair minus those of the first, both COCO
    detections on all images; the mean over the pairs, for which the same images are drawn.

    All NaN without objects. A draw without any object, which only tiny sets have, is left out.

    Raises ValueError: a detection of an unknown image or category, no pair, or fewer than one draw.
    """
    drawn = [
        tuple(drawn_metrics(ground_truth, results, draws, seed) for results in pair)
        for pair in pairs
    ]
    return paired_test(drawn)


def drawn_metrics(
    ground_truth: dict, results: list[dict], draws: int = 1000, seed: int = 0
) -> np.ndarray:
    """(1 + B, 3) AP, AP50 and AP75 of a detector in percent, first on the images as they are, then
    on each draw of them; NaN without objects. One seed draws the same images for all detectors.

    Raises ValueError: a detection of an unknown image or category, or fewer than one draw.
    """
    if draws < 1:
        raise ValueError(f"The bootstrap takes at least one draw, not {draws}.")
    classes = _classes(ground_truth, results)
    images = len(ground_truth["images"])
    weights = [np.ones(images), *_draw(np.random.default_rng(seed), images, draws)]
    return np.stack([_metrics(classes, weight) for weight in weights])


def paired_test(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Difference]:
    """`paired_bootstrap` of what `drawn_metrics` gives for each detector.

    Raises ValueError: no pair.
    """
    if not pairs:
        raise ValueError("The bootstrap takes at least one pair of detectors.")
    value, *drawn = np.mean([second - first for first, second in pairs], axis=0)
    drawn = np.reshape(drawn, (-1, 3))
    drawn = drawn[np.isfinite(drawn).all(axis=1)]
    return {name: _summary(*both) for name, *both in zip(METRICS, value.tolist(), drawn.T)}


def _draw(rng: np.random.Generator, images: int, draws: int):
    """How often each image is drawn: `draws` arrays of shape (I,)."""
    for _ in range(draws if images else 0):
        yield np.bincount(rng.integers(images, size=images), minlength=images)


def _summary(value: float, drawn: np.ndarray) -> Difference:
    if not len(drawn) or np.isnan(value):
        return Difference(*[float("nan")] * 4)
    low, high = np.percentile(drawn, [2.5, 97.5])
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, float(2 * (beyond + 1) / (len(drawn) + 1)))
    return Difference(value, float(low), float(high), p)


def _classes(ground_truth: dict, results: list[dict]) -> list[_Class]:
    """The matches of each class that has objects."""
    outcome = match_detections(ground_truth, results, IOU_THRESHOLDS).outcome
    order = falling_order(ground_truth, results)
    number = image_numbers(ground_truth)
    image = np.array([number[results[row]["image_id"]] for row in order], dtype=np.int64)
    category = np.array([results[row]["category_id"] for row in order])
    outcome = outcome[:, order]
    classes = []
    for id_ in sorted(c["id"] for c in ground_truth["categories"]):
        objects = np.zeros(len(number))
        for ann in ground_truth["annotations"]:
            if ann["category_id"] == id_ and not ann.get("iscrowd", 0):
                objects[number[ann["image_id"]]] += 1
        if objects.any():
            of = np.flatnonzero(category == id_)
            found = [np.flatnonzero(row == FOUND) for row in outcome[:, of]]
            classes.append(_Class(found, outcome[:, of] == IGNORED, image[of], objects))
    return classes


def _metrics(classes: list[_Class], weight: np.ndarray) -> np.ndarray:
    """AP, AP50 and AP75 in percent with the images (I,) weighted; NaN without objects."""
    by_class = [_by_iou(one, weight) for one in classes if one.objects @ weight > 0]
    if not by_class:
        return np.full(3, np.nan)
    by_iou = 100 * np.mean(by_class, axis=0)
    return np.array([by_iou.mean(), by_iou[0], by_iou[5]])


def _by_iou(one: _Class, weight: np.ndarray) -> list[float]:
    """AP of a class at each threshold."""
    weights, objects = weight[one.image], float(one.objects @ weight)
    all_counted = np.cumsum(weights)
    values = []
    for found, ignored in zip(one.found, one.ignored):
        counted = np.cumsum(weights * ~ignored) if ignored.any() else all_counted
        values.append(float(interpolated_precision(found, weights, counted, objects).mean()))
    return values
