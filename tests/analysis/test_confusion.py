"""Confusion of classes counted by hand, F1 by trying every score, matches against one at a time."""

import numpy as np
import pytest

from iou_d2.analysis.average_precision import IOU_THRESHOLDS, coco_precision_recall
from iou_d2.analysis.confusion import best_f1_score, confusion_matrix
from iou_d2.analysis.matching import (
    FOUND,
    IGNORED,
    best_of_each_image,
    match_detections,
)
from random_coco import make_random_coco


def record(image_id, category_id, x, **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": [x, 0, 10, 10], **more}


def matrix(annotations, results, min_score=0.0):
    truth = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}],
        "annotations": annotations,
    }
    matches = match_detections(truth, results, [0.5])
    return confusion_matrix(truth, results, matches, min_score, 0.5).tolist()


def test_a_matrix_counted_by_hand():
    annotations = [
        record(1, 3, 0),
        record(1, 7, 100),
        record(1, 3, 200),
        record(2, 7, 0),
        record(2, 7, 300, iscrowd=1),
    ]
    results = [
        record(1, 3, 1, score=0.9),
        record(1, 7, 2, score=0.8),  # the object is found already
        record(1, 3, 101, score=0.7),  # takes b for a
        record(1, 3, 102, score=0.6),  # the same, and it is taken
        record(2, 3, 300, score=0.5),  # of another class than the crowd
        record(2, 7, 301, score=0.4),  # in the crowd
    ]
    # Rows: a, b, nothing.
    assert matrix(annotations, results) == [[1, 0, 1], [1, 0, 1], [2, 1, 0]]
    assert matrix(annotations, results, min_score=0.65) == [[1, 0, 1], [1, 0, 1], [0, 1, 0]]
    assert matrix(annotations, []) == [[0, 0, 2], [0, 0, 2], [0, 0, 0]]
    assert matrix([], results[:1]) == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_every_object_and_every_detection_is_counted_once(seed):
    truth, results = make_random_coco(seed, images=20, classes=3)
    matches = match_detections(truth, results, [0.5])
    counts = confusion_matrix(truth, results, matches, 0.3, 0.5)
    kept = sum(r["score"] >= 0.3 and o != IGNORED for r, o in zip(results, matches.outcome[0]))
    objects = sum(not a["iscrowd"] for a in truth["annotations"])
    assert counts[:, :-1].sum() == kept and counts[:-1].sum() == objects


@pytest.mark.parametrize("steps", [0, 10])
def test_the_best_f1_is_that_of_trying_every_score(steps):
    truth, results = make_random_coco(5, images=20, classes=2, score_steps=steps)
    matches = match_detections(truth, results, [0.5])
    scores = np.array([result["score"] for result in results])
    objects = sum(not a["iscrowd"] for a in truth["annotations"])

    def f1(score):
        kept = matches.outcome[0][scores >= score]
        return 2 * (kept == FOUND).sum() / ((kept != IGNORED).sum() + objects)

    best = best_f1_score(matches, scores, objects)
    assert f1(best) == pytest.approx(max(f1(score) for score in scores))
    nothing = match_detections(truth, [], [0.5])
    assert np.isnan(best_f1_score(nothing, np.zeros(0), objects))


def test_thresholds_at_once_are_thresholds_one_by_one():
    truth, results = make_random_coco(6, images=20, classes=2)
    together = match_detections(truth, results, [0.3, 0.5, 0.75])
    for row, threshold in enumerate((0.3, 0.5, 0.75)):
        alone = match_detections(truth, results, [threshold])
        assert (together.outcome[row] == alone.outcome[0]).all()
        assert (together.found[row] == alone.found[0]).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_recall_of_coco_is_the_share_of_objects_that_are_found(seed):
    truth, results = make_random_coco(seed, images=20, classes=2)
    _, recall = coco_precision_recall(truth, results)
    outcome = match_detections(truth, results, IOU_THRESHOLDS).outcome
    for k, category in enumerate(truth["categories"]):
        of = [r["category_id"] == category["id"] for r in results]
        objects = sum(
            a["category_id"] == category["id"] and not a["iscrowd"] for a in truth["annotations"]
        )
        assert recall[:, k, 0] == pytest.approx((outcome[:, of] == FOUND).sum(axis=1) / objects)


def test_the_best_of_each_image_and_class_stay_in_order():
    results = [record(1, 3, x, score=score) for x, score in enumerate((0.1, 0.9, 0.5))]
    results += [record(2, 3, 0, score=0.2), record(1, 7, 0, score=0.05)]
    kept = best_of_each_image(results, 2)
    assert [r["score"] for r in kept] == [0.9, 0.5, 0.2, 0.05]
    assert best_of_each_image(results, 9) is results
