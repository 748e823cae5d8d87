"""comparison.py against pycocotools and cases counted by hand."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iou_d2.analysis import metric_by_iteration, recall_by_false_positives


def dataset(annotations, images=(1, 2)):
    return {
        "images": [{"id": i} for i in images],
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}],
        "annotations": annotations,
    }


def annotation(image_id, bbox, category_id=3, **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def curve(truth, results, **arguments):
    false_positives, recall = recall_by_false_positives(truth, results, **arguments)
    return list(zip(false_positives.tolist(), recall.tolist()))


def test_a_curve_counted_by_hand():
    truth = dataset(
        [
            annotation(1, [0, 0, 10, 10]),
            annotation(1, [0, 0, 10, 14]),
            annotation(1, [50, 50, 10, 10], category_id=7),
            annotation(2, [0, 0, 10, 10]),
        ]
    )
    results = [
        annotation(1, [50, 50, 10, 10], score=0.3),  # of another class
        annotation(1, [0, 0, 10, 12], score=0.9),  # 12/14 with the second, 10/12 with the first
        annotation(1, [0, 0, 10, 14], score=0.8),  # its best object is taken: 10/14 with the other
        annotation(1, [0, 0, 10, 10], score=0.7),  # both are taken, unless 10/14 is too little
        annotation(2, [0, 0, 10, 5], score=0.6),  # exactly one half
        annotation(2, [30, 30, 10, 5], score=0.5),
    ]
    expected = [(0, 0.25), (0, 0.5), (1, 0.5), (1, 0.75), (2, 0.75), (3, 0.75)]
    assert curve(truth, results) == expected
    assert curve(truth, results, min_iou=0.75)[-1] == (4, 0.5)


def test_crowds_are_no_objects_and_what_lies_in_them_does_not_count():
    truth = dataset(
        [annotation(1, [0, 0, 100, 100], iscrowd=1), annotation(1, [10, 10, 10, 10], iscrowd=0)]
    )
    results = [
        annotation(1, [10, 10, 10, 10], score=0.9),
        annotation(1, [10, 10, 10, 10], score=0.8),  # the object is taken; it lies in the crowd
        annotation(1, [95, 95, 10, 10], score=0.7),  # a quarter of it does
    ]
    assert curve(truth, results) == [(0, 1.0), (1, 1.0)]


def test_nothing_to_find_and_nothing_found():
    truth = dataset([annotation(1, [0, 0, 5, 5])])
    assert curve(truth, []) == []
    false_positives, recall = recall_by_false_positives(
        dataset([]), [annotation(1, [0, 0, 5, 5], score=1)]
    )
    assert false_positives.tolist() == [1] and np.isnan(recall).all()
    with pytest.raises(ValueError, match="image_id 9"):
        recall_by_false_positives(truth, [annotation(9, [0, 0, 5, 5], score=1)])


def test_it_counts_as_pycocotools_does():
    rng = np.random.default_rng(0)

    def boxes(count, **more):
        return [
            annotation(
                int(rng.integers(1, 4)),
                [*rng.uniform(0, 60, 2).tolist(), *rng.uniform(10, 50, 2).tolist()],
                int(rng.choice([3, 7])),
                **{key: make() for key, make in more.items()},
            )
            for _ in range(count)
        ]

    truth = dataset(boxes(40, iscrowd=lambda: int(rng.random() < 0.15)), images=(1, 2, 3))
    results = boxes(300, score=lambda: float(rng.random()))
    false_positives, recall = recall_by_false_positives(truth, results)

    for number, ann in enumerate(truth["annotations"], 1):
        ann.update(id=number, area=ann["bbox"][2] * ann["bbox"][3])
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.maxDets = [1000]
        evaluation.evaluate()
    found = ignored = 0
    for image in evaluation.evalImgs:
        if image and image["aRng"] == evaluation.params.areaRng[0]:
            ignored += image["dtIgnore"][0].sum()
            found += ((image["dtMatches"][0] > 0) & ~image["dtIgnore"][0]).sum()
    objects = sum(not ann["iscrowd"] for ann in truth["annotations"])
    assert ignored > 5 and found > 10
    assert len(recall) == len(results) - ignored
    assert recall[-1] == pytest.approx(found / objects)
    assert false_positives[-1] == len(results) - ignored - found


def test_metric_by_iteration():
    lines = [
        {"iteration": 19, "loss": 1.0},
        {"iteration": 99, "AP": 3.0, "loss": 0.5},
        {"iteration": 199, "AP": 9.0},
        {"iteration": 199, "AP": 5.0},  # logged again after a resume
        {"iteration": 149, "AP": 4.0},
        {"iteration": 250, "AP": 6.0},  # after the last one
        {"AP": 7.0},  # an evaluation alone
    ]
    iterations, values = metric_by_iteration(lines, "AP", max_iter=250)
    assert iterations.tolist() == [100, 150, 200, 250] and values.tolist() == [3, 4, 5, 6]
    iterations, values = metric_by_iteration([], "AP", max_iter=250)
    assert iterations.shape == values.shape == (0,)
