"""All numbers of a page, each counted once by iou_d2/analysis.

Shapes: T = 10 IoU thresholds, R = 101 recall levels, K classes in order of their category id,
D detections, G annotations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iou_d2.analysis.average_precision import (
    ap_by_iou,
    coco_precision_recall,
    precision_by_recall,
    summarize_ap,
)
from iou_d2.analysis.calibration import Reliability, reliability
from iou_d2.analysis.comparison import same_truth
from iou_d2.analysis.confusion import best_f1_score, confusion_matrix
from iou_d2.analysis.curves import localization_table
from iou_d2.analysis.errors_of_detections import (
    FOREGROUND,
    DetectionErrors,
    ErrorTable,
    find_errors,
    weigh_errors,
)
from iou_d2.analysis.matching import IGNORED, best_of_each_image, match_detections
from iou_d2.analysis.paired_test import Difference, paired_bootstrap
from iou_d2.analysis.records import Records, make_records

from .subject import Subject

PRECISION_AT = (0.5, 0.75, 0.9)  # IoU thresholds of the curves of precision against recall
# Areas in pixels up to which COCO calls an object small, and medium. One of just such an area
# belongs to the next range as well.
_SMALL, _MEDIUM = 32**2, 96**2


@dataclass(frozen=True)
class Measures:
    """Of one subject with ground truth and results.

    Attributes:
        truth, results: what is counted; `results` are the best of each image and class.
        class_names: (K,). class_place: category id -> place among them.
        objects: (K,) how many there are of each class.
        sizes: "small", "medium", "large" -> how many objects, as COCO counts them.
        table: the AP table, in percent. by_iou, recall: (T,) in percent.
        precision: IoU threshold -> (R,) in percent.
        records, correlations: detections beside the truth.
        errors, error_table: TIDE's.
        score: from which on F1 is highest at IoU 0.5; NaN if nothing is found.
        confusion: (K + 1, K + 1) from that score on.
        calibration: signal -> Reliability, or None where it is no number in [0, 1].
    """

    truth: dict
    results: list[dict]
    class_names: list[str]
    class_place: dict
    objects: list[int]
    sizes: dict[str, int]
    table: dict[str, float]
    by_iou: np.ndarray
    recall: np.ndarray
    precision: dict[float, np.ndarray]
    records: Records
    correlations: dict[str, float]
    errors: DetectionErrors
    error_table: ErrorTable
    score: float
    confusion: np.ndarray
    calibration: dict[str, Reliability | None]


def measure(subject: Subject) -> Measures | None:
    """None where the subject has no ground truth or no results."""
    truth = subject.truth
    if truth is None or "annotations" not in truth or subject.results is None:
        return None
    results = best_of_each_image(list(subject.results), subject.max_dets)
    categories = sorted(truth["categories"], key=lambda category: category["id"])
    names = [str(category["name"]) for category in categories]
    precision, recall = coco_precision_recall(truth, results, max_dets=subject.max_dets)
    objects = [a for a in truth["annotations"] if not a.get("iscrowd", 0)]
    by_class = Counter(a["category_id"] for a in objects)
    records = make_records(truth, results)
    matches = match_detections(truth, results, [FOREGROUND])
    errors = find_errors(truth, results, matches)
    score = best_f1_score(matches, records.score, len(objects))
    return Measures(
        truth=truth,
        results=results,
        class_names=names,
        class_place={category["id"]: place for place, category in enumerate(categories)},
        objects=[by_class[category["id"]] for category in categories],
        sizes=_sizes(objects),
        table=summarize_ap(precision, names),
        by_iou=ap_by_iou(precision),
        recall=ap_by_iou(recall),
        precision={iou: precision_by_recall(precision, iou) for iou in PRECISION_AT},
        records=records,
        correlations=localization_table(records),
        errors=errors,
        error_table=weigh_errors(truth, results, errors),
        score=score,
        confusion=confusion_matrix(truth, results, matches, score, FOREGROUND),
        calibration=_calibration(records, matches.outcome[0]),
    )


def _sizes(objects: list[dict]) -> dict[str, int]:
    areas = np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in objects], np.float64)
    return {
        "small": int((areas <= _SMALL).sum()),
        "medium": int(((areas >= _SMALL) & (areas <= _MEDIUM)).sum()),
        "large": int((areas >= _MEDIUM).sum()),
    }


def _calibration(records: Records, outcome: np.ndarray) -> dict[str, Reliability | None]:
    """Scores against finding an object at IoU 0.5, predicted IoU against the true one."""
    counts = outcome != IGNORED
    calibration = {}
    for name, claimed in ranking_signals(records).items():
        true = records.true_iou if name == "pred_iou" else (outcome == 1).astype(np.float64)
        claimed, true = claimed[counts], true[counts]
        is_probability = ((claimed >= 0) & (claimed <= 1)).all()
        calibration[name] = reliability(claimed, true) if is_probability else None
    return calibration


def ranking_signals(records: Records) -> dict[str, np.ndarray]:
    """Those of `Records.signals`, without a class score that is the confidence itself."""
    signals = records.signals()
    if np.array_equal(signals["cls_score"], signals["confidence"]):
        del signals["cls_score"]
    return signals


def compare(measures: Sequence[Measures | None], draws: int) -> list[dict[str, Difference] | None]:
    """The paired test of each against the first: None for the first, and for those of other images
    or other objects."""
    first = measures[0] if measures else None
    tests: list[dict[str, Difference] | None] = [None]
    for other in measures[1:]:
        if first is None or other is None or not same_truth(first.truth, other.truth):
            tests.append(None)
        else:
            truth = _with_classes_of(other.truth, first.truth)
            tests.append(paired_bootstrap(truth, [(first.results, other.results)], draws))
    return tests


def _with_classes_of(other: dict, truth: dict) -> dict:
    """`truth` with the categories too that `other` alone has, which are without objects."""
    known = {category["id"] for category in truth["categories"]}
    more = [category for category in other["categories"] if category["id"] not in known]
    return {**truth, "categories": [*truth["categories"], *more]}
