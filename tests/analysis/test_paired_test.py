"""The paired bootstrap: each draw against COCO's own count on a dataset with the images drawn."""

import numpy as np
import pytest

from iou_d2.analysis import paired_test
from iou_d2.analysis.average_precision import coco_precision, summarize_ap
from iou_d2.analysis.paired_test import paired_bootstrap
from random_coco import make_random_coco


def drawn(truth, results, counts):
    """The dataset where image n stands counts[n] times, under new ids, and the results on it."""
    images, annotations, detections = [], [], []
    for image, count in zip(truth["images"], counts):
        for _ in range(count):
            new = len(images) + 1
            images.append({**image, "id": new})
            for source, copies in ((truth["annotations"], annotations), (results, detections)):
                copies += [
                    {**record, "image_id": new}
                    for record in source
                    if record["image_id"] == image["id"]
                ]
    return {**truth, "images": images, "annotations": annotations}, detections


def counted(truth, results):
    table = summarize_ap(coco_precision(truth, results), [])
    return [table[name] for name in ("AP", "AP50", "AP75")]


@pytest.mark.parametrize("seed", range(3))
def test_a_draw_counts_as_coco_does_with_the_images_drawn(seed):
    truth, results = make_random_coco(seed, images=12, classes=2)
    classes = paired_test._classes(truth, results)
    rng = np.random.default_rng(seed)
    for counts in [np.ones(12, dtype=int), *paired_test._draw(rng, 12, 3)]:
        found = paired_test._metrics(classes, counts.astype(float))
        assert found == pytest.approx(counted(*drawn(truth, results, counts)), abs=1e-9)


def test_the_same_detector_is_no_better_and_a_worse_one_is_worse():
    truth, results = make_random_coco(0, images=40, classes=2)
    same = paired_bootstrap(truth, [(results, results)], draws=50)
    assert same["AP"] == (0, 0, 0, 1)
    worse = [
        {**result, "bbox": [x + w / 3, y, w, h]}
        for result in results
        for x, y, w, h in [result["bbox"]]
    ]
    test = paired_bootstrap(truth, [(results, worse)], draws=200)
    first, second = counted(truth, results), counted(truth, worse)
    assert [d.value for d in test.values()] == pytest.approx(np.subtract(second, first))
    assert test["AP"].low < test["AP"].value < test["AP"].high < 0
    assert test["AP"].p == pytest.approx(2 / 201)
    back = paired_bootstrap(truth, [(worse, results)], draws=200)
    assert back["AP"].low == pytest.approx(-test["AP"].high)


def test_of_several_pairs_it_is_the_mean_difference_on_the_same_images():
    truth, results = make_random_coco(0, images=30, classes=2)
    _, others = make_random_coco(1, images=30, classes=2)
    known = {image["id"] for image in truth["images"]}
    others = [result for result in others if result["image_id"] in known]
    pairs = [(results, others), (others, results[::2])]
    one, two = (paired_bootstrap(truth, [pair], draws=50)["AP"] for pair in pairs)
    both = paired_bootstrap(truth, pairs, draws=50)["AP"]
    assert both.value == pytest.approx((one.value + two.value) / 2)
    # There and back again: each draw's differences cancel, but only where its images are the same.
    there_and_back = paired_bootstrap(truth, [pairs[0], pairs[0][::-1]], draws=50)["AP"]
    assert there_and_back == pytest.approx((0, 0, 0, 1))
    with pytest.raises(ValueError, match="at least one pair"):
        paired_bootstrap(truth, [], draws=5)


def test_no_objects_no_detections_and_no_draws():
    truth, results = make_random_coco(0, images=5, classes=2)
    nothing = paired_bootstrap({**truth, "annotations": []}, [(results, results)], draws=5)
    assert np.isnan(nothing["AP"]).all()
    assert paired_bootstrap(truth, [([], results)], draws=5)["AP"].value == pytest.approx(
        counted(truth, results)[0]
    )
    with pytest.raises(ValueError, match="at least one draw, not 0"):
        paired_bootstrap(truth, [(results, results)], draws=0)
