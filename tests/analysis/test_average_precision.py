"""AP against a second count in plain loops; the two back ends against each other."""

import copy
import importlib.util
import math
import sys

import numpy as np
import pytest

from iou_d2.evaluation import IOU_THRESHOLDS, ap_by_iou, coco_precision, summarize_ap
from random_coco import make_random_coco

BACKENDS = ("pycocotools", "faster")
AREAS = {"all": (0, 1e10), "s": (0, 1024), "m": (1024, 9216), "l": (9216, 1e10)}


def overlap(detection, truth):
    """IoU of two XYWH boxes; with a crowd, the share of the detection that lies inside."""
    (x, y, w, h), (u, v, s, t) = detection["bbox"], truth["bbox"]
    inter = max(min(x + w, u + s) - max(x, u), 0) * max(min(y + h, v + t) - max(y, v), 0)
    return inter / (w * h if truth["iscrowd"] else w * h + s * t - inter)


def match_image(detections, truths, threshold, area):
    """COCO's greedy matching: [(score, is_true_positive)] of what counts, number of objects."""
    low, high = AREAS[area]
    ignored = [t["iscrowd"] == 1 or not low <= t["area"] <= high for t in truths]
    free, counted = [True] * len(truths), []
    for detection in sorted(detections, key=lambda d: -d["score"]):
        best = None
        for is_ignored in (False, True):  # an object that counts goes before any that does not
            for j, truth in enumerate(truths):
                if best is not None and ignored[best] != is_ignored:
                    continue
                usable = free[j] or truth["iscrowd"]
                if ignored[j] != is_ignored or not usable or overlap(detection, truth) < threshold:
                    continue
                if best is None or overlap(detection, truth) > overlap(detection, truths[best]):
                    best = j
        if best is not None:
            free[best] = False
            if not ignored[best]:
                counted.append((detection["score"], True))
        elif low <= detection["bbox"][2] * detection["bbox"][3] <= high:
            counted.append((detection["score"], False))
    return counted, ignored.count(False)


def loop_ap(ground_truth, results, category_id, threshold, area="all", max_dets=100):
    """AP of one class in percent: the mean over 101 recalls of the best precision from there on."""
    counted, objects = [], 0
    for image in ground_truth["images"]:
        here = [
            [e for e in entries if (e["image_id"], e["category_id"]) == (image["id"], category_id)]
            for entries in (results, ground_truth["annotations"])
        ]
        best = sorted(here[0], key=lambda d: -d["score"])[:max_dets]
        found, number = match_image(best, here[1], threshold, area)
        counted, objects = counted + found, objects + number
    if objects == 0:
        return math.nan
    points, positives = [], 0
    for n, (_, hit) in enumerate(sorted(counted, key=lambda c: -c[0]), 1):
        positives += hit
        points.append((positives / objects, positives / n))
    levels = np.linspace(0, 1, 101)
    return 100 * sum(max([p for r, p in points if r >= level], default=0) for level in levels) / 101


def mean_over_classes(ground_truth, results, thresholds, **options):
    values = [
        loop_ap(ground_truth, results, category["id"], threshold, **options)
        for category in ground_truth["categories"]
        for threshold in thresholds
    ]
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values)


def names(ground_truth):
    return [category["name"] for category in ground_truth["categories"]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [1, 3])
def test_table_equals_loops(backend, classes):
    truth, results = make_random_coco(seed=classes, images=14, classes=classes)
    table = summarize_ap(coco_precision(truth, results, backend=backend), names(truth))
    for percent in (50, 60, 70, 75, 80, 90):
        expected = mean_over_classes(truth, results, [percent / 100])
        assert table[f"AP{percent}"] == pytest.approx(expected, abs=1e-6), percent
    assert 5 < table["AP90"] < table["AP50"] < 95
    assert table["AP"] == pytest.approx(mean_over_classes(truth, results, IOU_THRESHOLDS), abs=1e-6)
    for area in "sml":
        expected = mean_over_classes(truth, results, IOU_THRESHOLDS, area=area)
        assert table[f"AP{area}"] == pytest.approx(expected, abs=1e-6), area
    for category in truth["categories"]:
        by_iou = [loop_ap(truth, results, category["id"], t) for t in IOU_THRESHOLDS]
        assert table[f"AP-{category['name']}"] == pytest.approx(np.mean(by_iou), abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_dets_counts_the_best(backend):
    truth, results = make_random_coco(seed=5, images=12, classes=1)
    by_iou = ap_by_iou(coco_precision(truth, results, max_dets=2, backend=backend))
    assert by_iou[0] == pytest.approx(mean_over_classes(truth, results, [0.5], max_dets=2))
    assert by_iou[0] < ap_by_iou(coco_precision(truth, results, backend=backend))[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_100_detections(backend):
    """150 exact boxes of 150 objects are all found, but only where 150 may count."""
    boxes = [[10 * i, 0, 8, 8] for i in range(150)]
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": b} for i, b in enumerate(boxes)
        ],
    }
    results = [
        {"image_id": 1, "category_id": 1, "bbox": b, "score": 1 - i / 1000}
        for i, b in enumerate(boxes)
    ]
    assert coco_precision(truth, results, max_dets=150, backend=backend)[:, :, 0, 0].min() == 1
    assert ap_by_iou(coco_precision(truth, results, backend=backend))[0] == pytest.approx(
        100 * 67 / 101
    )


@pytest.mark.parametrize(
    ("classes", "first_id", "score_steps"), [(1, 1, 0), (5, 0, 0), (40, 1, 0), (3, 1, 4), (2, 0, 1)]
)
def test_backends_agree(classes, first_id, score_steps):
    for seed in range(3):
        truth, results = make_random_coco(seed, 40, classes, first_id, score_steps)
        first, second = (coco_precision(truth, results, backend=b) for b in BACKENDS)
        assert first.shape == second.shape == (10, 101, classes, 4)
        np.testing.assert_allclose(first, second, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [str, lambda n: f"image {n:04d} of 3", lambda n: 2**40 + n])
def test_ids_do_not_matter(backend, kind):
    truth, results = make_random_coco(seed=1, images=10, classes=2)
    expected = coco_precision(truth, results, backend=backend)
    for image in truth["images"]:
        image["id"] = kind(image["id"])
    for box in truth["annotations"] + results:
        box["image_id"] = kind(box["image_id"])
    for n, annotation in enumerate(truth["annotations"]):
        annotation["id"] = n  # 0 is no match to pycocotools
    actual = coco_precision(truth, results, backend=backend)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_area_and_iscrowd_may_be_missing(backend):
    truth, results = make_random_coco(seed=2, images=10, classes=2)
    for annotation in truth["annotations"]:
        annotation.update(iscrowd=0, area=annotation["bbox"][2] * annotation["bbox"][3])
    bare = copy.deepcopy(truth)
    for annotation in bare["annotations"]:
        del annotation["iscrowd"], annotation["area"], annotation["id"]
    expected, actual = (coco_precision(t, results, backend=backend) for t in (truth, bare))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("area", [3, None, "x"])
def test_the_area_that_a_results_file_gives_is_not_read(backend, area):
    """COCO.loadRes takes that of the box."""
    truth, results = make_random_coco(seed=2, images=10, classes=2)
    expected = coco_precision(truth, results, backend=backend)
    given = [{**result, "area": area} for result in results]
    np.testing.assert_array_equal(coco_precision(truth, given, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_find_or_nothing_found(backend):
    truth, results = make_random_coco(seed=3, images=6, classes=2)
    table = summarize_ap(coco_precision(truth, [], backend=backend), names(truth))
    assert set(table.values()) == {0.0}

    crowds = copy.deepcopy(truth)
    for annotation in crowds["annotations"]:
        annotation["iscrowd"] = 1
    no_images = {**truth, "images": [], "annotations": []}
    for empty, found in (
        (crowds, results),
        ({**truth, "annotations": []}, results),
        (no_images, []),
    ):
        table = summarize_ap(coco_precision(empty, found, backend=backend), names(truth))
        assert all(math.isnan(value) for value in table.values()), table


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_without_objects_does_not_count(backend):
    truth, results = make_random_coco(seed=4, images=10, classes=3)
    alone = {**truth, "annotations": [a for a in truth["annotations"] if a["category_id"] == 3]}
    table = summarize_ap(coco_precision(alone, results, backend=backend), names(truth))
    assert table["AP"] == table["AP-class 1"] > 0
    assert math.isnan(table["AP-class 0"]) and math.isnan(table["AP-class 2"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_some_images_only(backend):
    truth, results = make_random_coco(seed=6, images=10, classes=2)
    some = [2, 5, 6, 9]
    part = {
        **truth,
        "images": [i for i in truth["images"] if i["id"] in some],
        "annotations": [a for a in truth["annotations"] if a["image_id"] in some],
    }
    expected = coco_precision(part, [r for r in results if r["image_id"] in some], backend=backend)
    actual = coco_precision(truth, results, image_ids=some, backend=backend)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_inputs_are_left_alone():
    truth, results = make_random_coco(seed=7, images=4, classes=2)
    before = copy.deepcopy((truth, results))
    for backend in BACKENDS:
        coco_precision(truth, results, backend=backend)
    assert (truth, results) == before


def test_wrong_arguments():
    truth, results = make_random_coco(seed=8, images=4, classes=1)
    with pytest.raises(ValueError, match="'fast'"):
        coco_precision(truth, results, backend="fast")
    with pytest.raises(ValueError, match="image_id 99"):
        coco_precision(truth, [{**results[0], "image_id": 99}])
    with pytest.raises(ValueError, match="category_id 'cat'"):
        coco_precision(truth, [{**results[0], "category_id": "cat"}])


def test_pycocotools_alone_is_enough(monkeypatch):
    truth, results = make_random_coco(seed=9, images=4, classes=2)
    expected = coco_precision(truth, results, backend="pycocotools")
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    np.testing.assert_array_equal(coco_precision(truth, results), expected)
    with pytest.raises(ImportError):
        coco_precision(truth, results, backend="faster")
