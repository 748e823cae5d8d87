"""match_detections against the matches that pycocotools makes, ties and odd boxes included."""

from __future__ import annotations

import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iou_d2.analysis.errors_of_detections import find_errors, weigh_errors
from iou_d2.analysis.matching import FALSE, FOUND, IGNORED, match_detections
from iou_d2.analysis.paired_test import paired_bootstrap

THRESHOLDS = [0.5, 0.75]


def scene(boxes, detections, crowds=()):
    """One image and one class; detections are (score, box)."""
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "width": 400, "height": 400}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [annotation(n, box, n - 1 in crowds) for n, box in enumerate(boxes, 1)],
    }
    return truth, [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": score} for score, box in detections
    ]


def annotation(number, box, is_crowd, image_id=1, category_id=1):
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": int(is_crowd),
    }


def official(truth, results):
    """pycocotools after its evaluation, and what it says of each detection: (T, D) outcomes."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {**copy.deepcopy(truth), "info": {}}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.params.iouThrs = np.array(THRESHOLDS)
        evaluation.evaluate()
        evaluation.accumulate()
    outcome = np.full((len(THRESHOLDS), len(results)), -1)
    found = np.full(outcome.shape, -1)
    for image in evaluation.evalImgs:
        if image is None or image["aRng"] != evaluation.params.areaRng[0]:
            continue
        rows = np.array(image["dtIds"], dtype=int) - 1  # loadRes counts from 1
        matched = image["dtMatches"].astype(int)
        named = np.where(matched > 0, FOUND, FALSE)
        outcome[:, rows] = np.where(image["dtIgnore"], IGNORED, named)
        found[:, rows] = np.where(image["dtIgnore"], 0, matched) - 1
    return evaluation, outcome, found


def on_a_grid(seed):
    """Boxes of whole pixels on a few places, so that many IoUs are equal; a fifth are crowds, and
    a tenth of the detections have a negative side."""
    rng = np.random.default_rng(seed)

    def box():
        return [*rng.integers(0, 12, 2).tolist(), *rng.integers(5, 12, 2).tolist()]

    annotations, results = [], []
    for image_id in (1, 2, 3):
        for _ in range(8):
            is_crowd, category_id = rng.random() < 0.2, int(rng.integers(1, 3))
            number = len(annotations) + 1
            annotations.append(annotation(number, box(), is_crowd, image_id, category_id))
        for _ in range(12):
            x, y, w, h = box()
            results.append(
                {
                    "image_id": image_id,
                    "category_id": int(rng.integers(1, 3)),
                    "bbox": [x, y, w, -h if rng.random() < 0.1 else h],
                    "score": float(rng.integers(1, 6) / 5),
                }
            )
    truth, _ = scene([], [])
    images = [{**truth["images"][0], "id": image_id} for image_id in (1, 2, 3)]
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    return {"images": images, "categories": categories, "annotations": annotations}, results


@pytest.mark.parametrize("seed", range(20))
def test_equal_ious_crowds_and_negative_sides_match_as_in_coco(seed):
    truth, results = on_a_grid(seed)
    _, outcome, found = official(truth, results)
    matches = match_detections(truth, results, THRESHOLDS)
    np.testing.assert_array_equal(matches.outcome, outcome)
    np.testing.assert_array_equal(matches.found, found)


def test_of_two_objects_with_equal_ious_the_last_is_found():
    boxes = [[10, 0, 30, 10], [20, 0, 30, 10]]
    truth, results = scene(boxes, [(0.9, [15, 0, 30, 10]), (0.8, [5, 0, 30, 10])])
    assert match_detections(truth, results, [0.5]).found.tolist() == [[1, 0]]


ODD_BOXES = [[20, 20, -5, 5], [20, 20, 5, -5], [0, 0, 2e5, 1e5]]


@pytest.mark.parametrize("box", ODD_BOXES)
def test_a_box_whose_area_coco_does_not_count_is_no_error(box):
    truth, results = scene([[10, 10, 30, 30]], [(0.95, box), (0.9, [10, 10, 30, 30])])
    evaluation, *_ = official(truth, results)
    assert evaluation.eval["precision"][0, :, 0, 0, -1].mean() == pytest.approx(1)
    assert paired_bootstrap(truth, [([], results)], draws=1)["AP"].value == pytest.approx(100)
    table = weigh_errors(truth, results, find_errors(truth, results))
    assert table.ap50 == pytest.approx(100) and sum(table.count.values()) == 0


@pytest.mark.parametrize("box", ODD_BOXES)
def test_such_a_box_counts_neither_where_there_are_no_objects(box):
    truth, results = scene([], [(0.95, box), (0.9, [10, 10, 30, 30])])
    assert match_detections(truth, results, [0.5]).outcome.tolist() == [[IGNORED, FALSE]]
