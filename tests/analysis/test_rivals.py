"""Boxes and their objects against loops over floats, and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from iou_d2.analysis import make_records
from iou_d2.analysis.rivals import (
    Nearest,
    find_rivals,
    nearest_objects,
    paths_on_objects,
    summarize_rivals,
)
from random_coco import make_random_coco


def overlap(first: list[float], second: list[float]) -> float:
    (x, y, w, h), (u, v, s, t) = first, second
    width, height = min(x + w, u + s) - max(x, u), min(y + h, v + t) - max(y, v)
    inner = max(width, 0) * max(height, 0)
    return inner / (w * h + s * t - inner)


def nearest_by_loops(truth: dict, result: dict) -> tuple[int, float]:
    best = (-1, 0.0)
    for index, annotation in enumerate(truth["annotations"]):
        same = all(annotation[key] == result[key] for key in ("image_id", "category_id"))
        if same and not annotation["iscrowd"]:
            iou = overlap(annotation["bbox"], result["bbox"])
            best = (index, iou) if iou > best[1] else best
    return best


@pytest.mark.parametrize("seed", [0, 1])
def test_the_object_of_a_box_is_that_of_loops(seed):
    truth, results = make_random_coco(seed, images=25, classes=2)
    nearest = nearest_objects(truth, results)
    expected = [nearest_by_loops(truth, result) for result in results]
    assert nearest.annotation.tolist() == [index for index, _ in expected]
    np.testing.assert_allclose(nearest.iou, [iou for _, iou in expected], atol=1e-12)
    np.testing.assert_allclose(nearest.iou, make_records(truth, results).true_iou, atol=1e-12)
    assert (nearest.annotation >= 0).sum() > 20 and (nearest.annotation < 0).sum() > 5


@pytest.mark.parametrize("steps", [0, 3])
def test_rivals_are_those_of_loops(steps):
    truth, results = make_random_coco(3, images=60, classes=1, score_steps=steps)  # 3: with ties
    rng = np.random.default_rng(0)
    score, signal = np.array([r["score"] for r in results]), rng.random(len(results)).round(1)
    nearest = nearest_objects(truth, results)
    rivals = find_rivals(nearest, score, signal, min_iou=0.6)
    objects = [nearest_by_loops(truth, result)[0] for result in results]
    expected = []
    for index in range(len(truth["annotations"])):
        own = [row for row, one in enumerate(objects) if one == index and nearest.iou[row] >= 0.6]
        if len(own) > 1:
            picks = [max(own, key=lambda r: v[r]) for v in (score, signal, nearest.iou)]
            expected.append((index, *picks))
    assert len(expected) > 10
    assert list(zip(*(part.tolist() for part in rivals))) == expected


def test_what_is_said_of_rivals():
    """Objects 0 and 2 have rivals; the signal picks the better box of the first only."""
    nearest = Nearest(np.array([0, 0, 1, 2, 2, -1]), np.array([0.6, 0.8, 0.9, 0.7, 0.5, 0.0]))
    score = np.array([0.9, 0.1, 0.5, 0.8, 0.2, 1.0])
    rivals = find_rivals(nearest, score, signal=np.array([0.1, 0.9, 0.5, 0.2, 0.3, 1.0]))
    assert rivals.annotation.tolist() == [0, 2]
    assert rivals.by_score.tolist() == [0, 3] and rivals.by_signal.tolist() == [1, 4]
    table = summarize_rivals(rivals, nearest.iou)
    assert table == {
        "objects": 2,
        "iou_by_score": pytest.approx(0.65),
        "iou_by_signal": pytest.approx(0.65),
        "iou_best": pytest.approx(0.75),
        "better": 1,
        "worse": 1,
    }


def test_a_signal_that_is_no_number_picks_nothing_better():
    nearest = Nearest(np.array([0, 0]), np.array([0.6, 0.8]))
    rivals = find_rivals(nearest, np.array([0.9, 0.1]), np.array([math.nan, 0.2]))
    assert rivals.by_signal.tolist() == [1]


def test_nothing_found_has_no_rivals_and_no_paths():
    truth, _ = make_random_coco(0, images=3, classes=1)
    nearest = nearest_objects(truth, [])
    rivals = find_rivals(nearest, np.zeros(0), np.zeros(0))
    table = summarize_rivals(rivals, nearest.iou)
    assert table["objects"] == table["better"] == 0 and math.isnan(table["iou_best"])
    assert len(paths_on_objects(truth, []).row) == 0
    alone = nearest_objects({**truth, "annotations": []}, [{"image_id": 1, "category_id": 1}])
    assert alone.annotation.tolist() == [-1] and alone.iou.tolist() == [0.0]


def test_the_iou_along_a_path_is_that_with_the_first_object():
    """A box as wide as its object, d pixels beside it, has the IoU (100 - d) / (100 + d)."""
    objects = [[0, 0, 100, 50], [100, 0, 100, 50], [0, 100, 100, 50]]
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 7, "name": "a"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 7, "bbox": box, "iscrowd": int(n == 2)}
            for n, box in enumerate(objects)
        ],
    }

    def path(shifts, y=0):
        return {
            "image_id": 1,
            "category_id": 7,
            "bbox": [shifts[0], y, 100, 50],
            "boxes": [[d, y, 100 + d, 50 + y] for d in shifts],
            "pred_ious": [0.5 + d / 1000 for d in shifts],
        }

    # The first ends on the other object, the second misses, the third begins on a crowd.
    paths = [path([20, 10, 80]), path([50, 20, 0]), path([0, 0, 0], y=100)]
    found = paths_on_objects(truth, paths)
    assert found.row.tolist() == [0] and found.annotation.tolist() == [0]
    np.testing.assert_allclose(found.true, [[80 / 120, 90 / 110, 20 / 180]])
    np.testing.assert_allclose(found.predicted, [[0.52, 0.51, 0.58]])
