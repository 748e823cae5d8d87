"""What the anchors of the RPN learn: section 3.1.2 and 3.1.3 of Faster R-CNN (arXiv 1506.01497), by
loops over fractions. Boxes have whole coordinates, so that IoUs and ties are exact."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

HIGH, LOW = Fraction(7, 10), Fraction(3, 10)
OBJECT = [0, 0, 10, 10]


@pytest.fixture
def rpn(small_cfg):
    """As it is trained, but for its small backbone."""
    return build_model(small_cfg("faster_rcnn_R_50_FPN_1x")).proposal_generator


def truth(boxes, size=(1000, 1000)):
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    return instances


def label(rpn, anchors, *objects, size=(1000, 1000)):
    """Labels and the objects' boxes, of each image."""
    anchors = [Boxes(torch.tensor(level, dtype=torch.float32)) for level in anchors]
    labels, boxes = rpn.label_and_sample_anchors(anchors, [truth(x, size) for x in objects])
    return [x.tolist() for x in labels], [x.tolist() for x in boxes]


def label_all(rpn, anchors, objects):
    """Of one image and one level, without sampling."""
    rpn.batch_size_per_image, rpn.positive_fraction = len(anchors), 1.0
    labels, boxes = label(rpn, [anchors], objects)
    return labels[0], boxes[0]


def iou(a, b) -> Fraction:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    inner = width * height
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return Fraction(inner, sum(areas) - inner)


def labels_by_hand(anchors, objects):
    """1, 0 or -1 of each anchor, and the object that it overlaps most."""
    ious = [[iou(a, o) for o in objects] for a in anchors]
    labels = []
    for row in ious:
        best = max(row)
        labels.append(1 if best >= HIGH else 0 if best < LOW else -1)
    for o in range(len(objects)):
        highest = max(row[o] for row in ious)
        for a, row in enumerate(ious):
            if row[o] == highest:
                labels[a] = 1
    return labels, [objects[row.index(max(row))] for row in ious]


def random_boxes(generator, count, side=40):
    corner = generator.integers(0, side - 12, (count, 2))
    return np.concatenate([corner, corner + generator.integers(3, 12, (count, 2))], 1).tolist()


@pytest.mark.parametrize("seed", range(8))
def test_labels_equal_a_loop(rpn, seed):
    generator = np.random.default_rng(seed)
    anchors, objects = random_boxes(generator, 200), random_boxes(generator, 1 + seed)
    anchors += [[x + 1, y, z + 1, w] for x, y, z, w in objects] + objects[:2]
    assert all(max(iou(a, o) for a in anchors) > 0 for o in objects)
    expected, owners = labels_by_hand(anchors, objects)
    assert len(set(expected)) == 3
    labels, boxes = label_all(rpn, anchors, objects)
    assert labels == expected
    for found, box, owner in zip(labels, boxes, owners):
        assert found != 1 or box == owner


@pytest.mark.parametrize(
    ("anchor", "overlap", "expected"),
    [
        ([0, 0, 7, 10], Fraction(70, 100), 1),  # "higher than 0.7", and equal to it
        ([0, 0, 10, 69], Fraction(100, 690), 0),
        ([0, 0, 1000, 1], Fraction(10, 1090), 0),
        ([0, 0, 3, 10], Fraction(30, 100), -1),  # "lower than 0.3", and not equal to it
        ([0, 0, 6, 10], Fraction(60, 100), -1),
        ([0, 0, 29, 10], Fraction(100, 290), -1),
        ([0, 0, 34, 10], Fraction(100, 340), 0),
        ([10, 0, 20, 10], Fraction(0), 0),
    ],
)
def test_the_limits_of_an_anchor_that_is_no_objects_best(rpn, anchor, overlap, expected):
    assert iou(anchor, OBJECT) == overlap
    labels, _ = label_all(rpn, [anchor, OBJECT], [OBJECT])
    assert labels == [expected, 1]


def test_the_best_anchors_of_an_object_learn_it_however_low(rpn):
    far = [500, 500, 900, 900]  # a tenth of a thousandth of it is the object
    objects = [OBJECT, [600, 600, 604, 604]]
    anchors = [far, OBJECT, [700, 700, 710, 710]]
    assert iou(far, objects[1]) == Fraction(1, 10000)
    labels, boxes = label_all(rpn, anchors, objects)
    assert labels == [1, 1, 0] and boxes[:2] == [objects[1], OBJECT]


def test_all_that_tie_for_an_object_learn_it(rpn):
    halves = [[0, 0, 5, 10], [5, 0, 10, 10], [0, 0, 10, 5]]
    labels, _ = label_all(rpn, [*halves, [0, 0, 4, 10]], [OBJECT])
    assert labels == [1, 1, 1, -1]


def test_of_two_objects_an_anchor_learns_the_one_that_it_overlaps_more(rpn):
    """Also where it is the best of the other one: in Detectron2, while the paper says nothing."""
    objects = [[0, 0, 20, 10], OBJECT]
    labels, boxes = label_all(rpn, [OBJECT, [300, 300, 310, 310]], objects)
    assert iou(OBJECT, objects[0]) == Fraction(1, 2)
    assert labels == [1, 0] and boxes[0] == OBJECT
    labels, boxes = label_all(rpn, [OBJECT], [OBJECT, OBJECT])
    assert labels == [1] and boxes[0] == OBJECT


def test_without_an_object_all_are_background(rpn):
    labels, boxes = label_all(rpn, [OBJECT, [3, 3, 5, 5]], [])
    assert labels == [0, 0] and np.shape(boxes) == (2, 4)


def test_anchors_across_the_border_learn_nothing_where_the_config_says_so(small_cfg):
    """Section 3.3 ignores them; Detectron2 does only with MODEL.RPN.BOUNDARY_THRESH 0."""
    across, inside = [-1, 0, 9, 10], [0, 0, 10, 10]
    for threshold, expected in ((-1, 1), (0, -1)):
        cfg = small_cfg("faster_rcnn_R_50_FPN_1x", "MODEL.RPN.BOUNDARY_THRESH", str(threshold))
        rpn = build_model(cfg).proposal_generator
        labels, _ = label(rpn, [[across, inside]], [inside], size=(11, 11))
        assert labels[0] == [expected, 1]


@pytest.mark.parametrize("config", ["faster_rcnn_R_50_FPN_1x", "quick/faster_rcnn_shapes"])
def test_settings_are_those_of_the_paper(config, small_cfg):
    rpn = build_model(small_cfg(config)).proposal_generator
    assert (rpn.batch_size_per_image, rpn.positive_fraction) == (256, 0.5)
    assert rpn.anchor_matcher.thresholds[1:-1] == [0.3, 0.7]


def many(positives, ignored, negatives):
    """Anchors of two levels: so many fit the object, overlap it by half, or are elsewhere."""
    anchors = [OBJECT] * positives + [[0, 0, 5, 10]] * ignored + [[50, 50, 60, 60]] * negatives
    return anchors[::2], anchors[1::2]


@pytest.mark.parametrize(
    ("positives", "negatives", "sampled"),
    [
        (300, 1000, (128, 128)),  # up to 1:1
        (128, 1000, (128, 128)),
        (10, 1000, (10, 246)),  # padded with negatives
        (300, 20, (128, 20)),  # never with positives
        (3, 4, (3, 4)),
        (1, 255, (1, 255)),
    ],
)
def test_256_anchors_of_an_image_are_sampled(rpn, positives, negatives, sampled):
    torch.manual_seed(0)
    anchors = many(positives, 7, negatives)
    labels, _ = label(rpn, anchors, [OBJECT], [OBJECT])
    truths = [iou(anchor, OBJECT) for level in anchors for anchor in level]
    for of_image in labels:
        assert (of_image.count(1), of_image.count(0)) == sampled
        for found, overlap in zip(of_image, truths):
            assert found == -1 or found == (overlap == 1)
            assert overlap != Fraction(1, 2) or found == -1
    if max(positives, negatives) > 256:
        assert labels[0] != labels[1]  # each image draws its own


def test_an_image_without_objects_samples_256_negatives(rpn):
    labels, _ = label(rpn, many(300, 0, 700), [])
    assert (labels[0].count(0), labels[0].count(1)) == (256, 0)


def test_the_sample_is_drawn_evenly_and_a_seed_repeats_it(rpn):
    anchors = many(300, 0, 400)
    torch.manual_seed(5)
    draws = [label(rpn, anchors, [OBJECT])[0][0] for _ in range(200)]
    torch.manual_seed(5)
    assert label(rpn, anchors, [OBJECT])[0][0] == draws[0] != draws[1]
    chosen = (torch.tensor(draws) >= 0).double().mean(dim=0)
    positive = torch.tensor([iou(a, OBJECT) == 1 for level in anchors for a in level])
    # Five standard deviations of a share of 200 draws.
    for mask, share in ((positive, 128 / 300), (~positive, 128 / 400)):
        spread = (share * (1 - share) / 200) ** 0.5
        assert (chosen[mask] - share).abs().max() < 5 * spread
        assert chosen[mask].std() == pytest.approx(spread, rel=0.3)
