"""records.py against loops, planted cases and broken files."""

import json
import logging
import math

import numpy as np
import pytest

from iou_d2.analysis import best_iou, make_records, read_records, read_results
from iou_d2.errors import InputError


def loop_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def random_boxes(rng, count):
    corner, size = rng.uniform(0, 50, (count, 2)), rng.uniform(1, 40, (count, 2))
    return np.concatenate([corner, corner + size], axis=1)


def test_best_iou_equals_loops():
    rng = np.random.default_rng(0)
    boxes, truth = random_boxes(rng, 40), random_boxes(rng, 7)
    expected = [max(loop_iou(a.tolist(), b.tolist()) for b in truth) for a in boxes]
    np.testing.assert_allclose(best_iou(boxes, truth), expected, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_best_iou_of_nothing(count):
    truth = np.array([[0.0, 0, 1, 1]])
    assert best_iou(np.zeros((0, 4)), truth[:count]).shape == (0,)
    assert best_iou(truth, truth[:0]).tolist() == [0.0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "box",
    [
        [10, 10, 0, 0],  # both sides inverted: the product of its sides is positive
        [10, 0, 0, 10],
        [5, 5, 5, 5],
        [5, 0, 5, 10],
        [np.nan, 0, 10, 10],
        [-np.inf, -np.inf, np.inf, np.inf],
        [np.inf] * 4,
        [0, 0, 1e200, 1e200],
    ],
)
def test_degenerate_boxes_have_no_iou(box):
    truth = np.array([[0.0, 0, 10, 10], [5, 5, 5, 5]])
    assert best_iou(np.array([box], dtype=np.float64), truth).tolist() == [0.0]
    assert best_iou(truth[:1], np.array([box], dtype=np.float64)).tolist() == [0.0]


def dataset(annotations, images=(1, 2)):
    return {
        "images": [{"id": i} for i in images],
        "categories": [{"id": 1, "name": "a"}, {"id": 7, "name": "b"}],
        "annotations": annotations,
    }


def annotation(image_id, category_id, bbox, **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def test_true_iou_is_of_the_same_image_and_class_and_no_crowd():
    truth = dataset(
        [
            annotation(1, 1, [0, 0, 10, 10]),
            annotation(1, 1, [0, 0, 10, 20], iscrowd=0),
            annotation(1, 7, [50, 50, 10, 10], iscrowd=1),
            annotation(2, 7, [0, 0, 10, 10]),
        ]
    )
    results = [
        annotation(1, 1, [0, 0, 10, 15], score=0.9),  # 2/3 with the first, 3/4 with the second
        annotation(1, 7, [50, 50, 10, 10], score=0.8),  # a crowd only
        annotation(2, 1, [0, 0, 10, 10], score=0.7),  # of another class
        annotation(2, 7, [0, 0, 10, 10], score=0.6),
    ]
    records = make_records(truth, results)
    np.testing.assert_allclose(records.true_iou, [0.75, 0, 0, 1])
    assert records.boxes[0].tolist() == [0, 0, 10, 15]
    assert records.category_id.tolist() == [1, 7, 1, 7]


def test_scores_of_plain_and_aware_detectors():
    plain = make_records(dataset([]), [annotation(1, 1, [0, 0, 1, 1], score=0.5)])
    assert plain.pred_iou is None and plain.cls_score.tolist() == [0.5]
    assert set(plain.signals()) == {"confidence", "cls_score"}

    aware = [annotation(1, 1, [0, 0, 1, 1], score=0.5, cls_score=0.9, pred_iou=0.3)]
    records = make_records(dataset([]), aware)
    assert records.cls_score.tolist() == [0.9] and records.pred_iou.tolist() == [0.3]
    assert "centerness" not in records.signals()
    centred = [annotation(1, 1, [0, 0, 1, 1], score=0.5, cls_score=0.9, centerness=0.7)]
    signals = make_records(dataset([]), centred).signals()
    assert signals["centerness"].tolist() == [0.7] and "pred_iou" not in signals

    with pytest.raises(ValueError, match='1 of 2 detections have the key "cls_score"'):
        make_records(dataset([]), aware + [annotation(1, 1, [0, 0, 1, 1], score=0.5)])


def test_no_detections_and_string_ids():
    assert len(make_records(dataset([annotation(1, 1, [0, 0, 1, 1])]), [])) == 0
    truth = dataset([annotation("im 1", 1, [0, 0, 4, 4])], images=["im 1"])
    assert make_records(truth, [annotation("im 1", 1, [0, 0, 4, 4], score=1)]).true_iou == [1.0]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


GOOD_GT = {
    **dataset([annotation(1, 1, [0, 0, 1, 1])]),
    "images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}],
}
GOOD_RESULTS = [annotation(1, 1, [0, 0, 1, 1], score=0.5)]


@pytest.mark.parametrize(
    ("gt", "results", "message"),
    [
        ('{"images": [', GOOD_RESULTS, r"gt\.json is not valid JSON"),
        ([], GOOD_RESULTS, r"gt\.json holds a list"),
        ({"images": []}, GOOD_RESULTS, r"gt\.json .* no list 'categories'"),
        (GOOD_GT, '[{"image_id": 1,', r"results\.json is not valid JSON"),
        (GOOD_GT, "[" * 100_000, r"results\.json nests brackets"),
        (GOOD_GT, "[1" + "0" * 5000 + "]", r"results\.json cannot be read"),
        (GOOD_GT, {}, r"results\.json should hold a JSON list .*, but holds a dict"),
        (GOOD_GT, [annotation(9, 1, [0, 0, 1, 1], score=1)], r"results\.json: \[0\] .*image_id 9"),
        (GOOD_GT, [annotation(1, 2, [0, 0, 1, 1], score=1)], r"results\.json: .*category_id 2"),
        (GOOD_GT, [annotation(1, 1, [0, 0, 1, 1])], r"results\.json: \[0\] has no score"),
        (GOOD_GT, [annotation(1, 1, [0, 0, 1], score=1)], r"results\.json: \[0\] needs a bbox"),
        (GOOD_GT, [annotation(1, 1, [0, 0, 1, 1], score=None)], r"results\.json: .* score"),
        (GOOD_GT, [annotation(1, 1, [0, 0, 1, 1], score=math.nan)], r"results\.json: .* not nan"),
        (GOOD_GT, [*GOOD_RESULTS, 5], r"results\.json: \[1\] is no detection"),
    ],
)
def test_broken_files_are_named(tmp_path, gt, results, message):
    gt_path = write(tmp_path / "gt.json", gt)
    results_path = write(tmp_path / "results.json", results)
    with pytest.raises(InputError, match=message):
        read_records(gt_path, results_path)


def test_strings_in_results_are_read(tmp_path):
    gt_path = write(tmp_path / "gt.json", GOOD_GT)
    strings = [annotation("1", "1", ["0", "0", "1", "1.0"], score="0.5")]
    records = read_records(gt_path, write(tmp_path / "results.json", strings))
    assert records.true_iou.tolist() == [1] and records.score.tolist() == [0.5]


def test_missing_file_is_named(tmp_path):
    results = write(tmp_path / "results.json", GOOD_RESULTS)
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        read_records(tmp_path / "nowhere.json", results)


@pytest.mark.parametrize(
    ("boxes", "doubt"),
    [
        ([[20, 20, 50, 50], [30, 30, 60, 60], [5, 40, 60, 60]], "look like corners"),
        ([[0.1, 0.1, 0.5, 0.5]] * 3, "look like fractions"),
        ([[20, 20, 30, 30], [5, 5, 60, 60], [0, 0, 1, 1]], None),
        ([[20, 20, 30, -3], [5, 5, 60, 60]], "1 of 2 boxes have a negative width or height"),
    ],
)
def test_results_that_are_hardly_xywh_in_pixels_are_read_with_a_warning(
    tmp_path, monkeypatch, boxes, doubt
):
    said = []
    monkeypatch.setattr(logging.getLogger("iou_d2.analysis.reading"), "warning", said.append)
    truth = {**GOOD_GT, "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}]}
    results = write(tmp_path / "results.json", [annotation(1, 1, box, score=0.5) for box in boxes])
    assert [r["bbox"] for r in read_results(results, truth)] == boxes
    assert len(said) == (doubt is not None) and all(doubt in line for line in said)
