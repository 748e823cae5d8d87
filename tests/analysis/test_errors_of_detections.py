"""Error types by cases of one each, and against the authors' tidecv on random sets."""

import numpy as np
import pytest

from iou_d2.analysis.average_precision import coco_precision, summarize_ap
from iou_d2.analysis.errors_of_detections import ERROR_TYPES, find_errors, weigh_errors
from random_coco import make_random_coco

# Numbers and dAP of `confused_coco(seed)` from tidecv 1.0.1, which has no numbers of the last two.
TIDECV = {
    1: {
        "AP50": 36.213758,
        "class": (19, 10.909977),
        "localisation": (14, 3.475301),
        "both": (10, 2.397617),
        "duplicate": (52, 3.298009),
        "background": (35, 10.387269),
        "missed": (10, 7.147695),
        "false positives": (None, 41.013965),
        "false negatives": (None, 11.131758),
    },
    4: {
        "AP50": 31.909691,
        "class": (17, 6.601857),
        "localisation": (13, 4.620709),
        "both": (3, 0.216413),
        "duplicate": (36, 6.030164),
        "background": (38, 8.736082),
        "missed": (11, 7.066695),
        "false positives": (None, 38.717372),
        "false negatives": (None, 10.327158),
    },
}


def confused_coco(seed: int) -> tuple[dict, list[dict]]:
    """Random objects, and detections of which many are of another class or beside their object."""
    truth, results = make_random_coco(seed, images=25, classes=3)
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = 0
    rng = np.random.default_rng(seed + 1000)
    for result in results:
        if rng.random() < 0.25:
            result["category_id"] = int(rng.choice([1, 3, 5]))
    for result in results[: len(results) // 3]:
        box = list(result["bbox"])
        box[0] += rng.normal() * box[2] * 0.4
        results.append({**result, "bbox": box, "score": float(rng.random())})
    return truth, results


@pytest.mark.parametrize("seed", TIDECV)
def test_it_counts_and_weighs_as_tidecv_does(seed):
    truth, results = confused_coco(seed)
    table = weigh_errors(truth, results, find_errors(truth, results))
    expected = dict(TIDECV[seed])
    assert table.ap50 == pytest.approx(expected.pop("AP50"), abs=1e-5)
    for kind, (count, gain) in expected.items():
        assert table.gain[kind] == pytest.approx(gain, abs=1e-5), kind
        if count is not None:
            assert table.count[kind] == count, kind


@pytest.mark.parametrize("seed", range(3))
def test_ap50_is_that_of_coco_also_with_crowds_and_ties(seed):
    truth, results = make_random_coco(seed, images=30, classes=3, score_steps=5)
    expected = summarize_ap(coco_precision(truth, results), [])["AP50"]
    found = weigh_errors(truth, results, find_errors(truth, results))
    assert found.ap50 == pytest.approx(expected, abs=1e-9)


def dataset(*objects):
    annotations = [
        {"image_id": 1, "category_id": category, "bbox": box, **more}
        for category, box, more in objects
    ]
    categories = [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}]
    return {"images": [{"id": 1}], "categories": categories, "annotations": annotations}


def detection(category, box, score):
    return {"image_id": 1, "category_id": category, "bbox": box, "score": score}


# One object of class 3, 100 x 100. A detection shifted by s overlaps it by (100 - s) / (100 + s).
@pytest.mark.parametrize(
    ("category", "shift", "kind"),
    [
        (3, 0, "found"),
        (3, 33, "found"),  # 0.504
        (3, 34, "localisation"),  # 0.493
        (3, 81, "localisation"),  # 0.105
        (3, 82, "background"),  # 0.099
        (7, 0, "class"),
        (7, 33, "class"),
        (7, 34, "both"),
        (7, 81, "both"),
        (7, 82, "background"),
        (7, 500, "background"),
    ],
)
def test_thresholds_of_the_types(category, shift, kind):
    truth = dataset((3, [0, 0, 100, 100], {}))
    errors = find_errors(truth, [detection(category, [shift, 0, 100, 100], 0.5)])
    assert errors.kind.tolist() == [kind]
    # Only these two would find the object without their error.
    assert errors.missed.tolist() == [kind in ("both", "background")]
    assert errors.unfound.tolist() == [kind != "found"]


def test_what_each_error_costs_by_hand():
    truth = dataset((3, [0, 0, 100, 100], {}), (3, [300, 0, 100, 100], {}))
    results = [
        detection(3, [0, 0, 100, 100], 0.9),
        detection(3, [0, 0, 100, 101], 0.8),  # the object is taken
        detection(7, [300, 0, 100, 100], 0.7),
        detection(3, [350, 0, 100, 100], 0.6),  # 1/3; about the same object, and worse scored
    ]
    errors = find_errors(truth, results)
    assert errors.kind.tolist() == ["found", "duplicate", "class", "localisation"]
    assert errors.target.tolist() == [-1, -1, 1, 1]
    assert not errors.missed.any()
    table = weigh_errors(truth, results, errors)
    half = 51 / 101  # the recall levels up to 1/2
    assert table.ap50 == pytest.approx(100 * half)
    # Found third of three: the other half of the levels at precision 2/3.
    assert table.gain["class"] == pytest.approx(100 * (50 / 101) * 2 / 3)
    assert table.gain["localisation"] == table.gain["duplicate"] == table.gain["missed"] == 0
    assert table.gain["false negatives"] == pytest.approx(100 * (1 - half))


def test_crowds_are_nothing_to_find_and_what_lies_in_them_is_no_error():
    truth = dataset((3, [0, 0, 100, 100], {"iscrowd": 1}))
    errors = find_errors(truth, [detection(3, [10, 10, 20, 20], 0.9)])
    assert errors.kind.tolist() == ["ignored"]
    assert not errors.missed.any() and not errors.unfound.any()


def test_nothing_found_and_nothing_to_find():
    truth = dataset((3, [0, 0, 100, 100], {}))
    table = weigh_errors(truth, [], find_errors(truth, []))
    assert table.ap50 == 0 and table.count["missed"] == 1
    empty = dataset()
    results = [detection(3, [0, 0, 9, 9], 0.5)]
    table = weigh_errors(empty, results, find_errors(empty, results))
    assert np.isnan(table.ap50)
    assert table.count == {**dict.fromkeys(ERROR_TYPES, 0), "background": 1}
