from __future__ import annotations

import math

import pytest
import torch
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances

from iou_d2 import get_config
from iou_d2.detectors.iou_net_inference import (
    GradientAscent,
    IteratedRegression,
    Postprocessor,
    build_postprocessor,
    select_boxes,
)
from iou_d2.detectors.iou_net_nms import (
    GuidedNMS,
    PlainNMS,
    SoftNMS,
    rank_by_iou,
    rank_by_product,
)
from iou_d2.errors import InputError

SIZES = [(80, 120), (100, 60)]


class Pooler:
    """Level 1 for boxes over 20 x 20, as of the boxes that it is given."""

    def assign_levels(self, boxes):
        return (torch.cat([x.area() for x in boxes]) > 400).long()


class Branch:
    """Predicts a smooth function of box, image and class, and remembers what it was asked."""

    pooler = Pooler()

    def __init__(self):
        self.levels, self.counts = [], []

    def predict(self, features, boxes, classes, levels=None):
        image = torch.cat([torch.full((len(x),), i) for i, x in enumerate(boxes)])
        tensor = torch.cat([x.tensor for x in boxes])
        self.levels.append(levels)
        self.counts.append(len(tensor))
        assert not any(x.requires_grad or x.is_inference() for x in features) or levels is None
        slope = torch.tensor([0.5, 1.0, 2.0, 1.5])
        return 0.5 + 0.5 * torch.sin(tensor @ slope / 50 + image + classes)


def random_outputs(class_specific=True, classes=3, rows=60):
    generator = torch.Generator().manual_seed(0)
    boxes, probabilities = [], []
    for height, width in SIZES:
        corner = torch.rand(rows, 2, generator=generator) * torch.tensor([width - 20, height - 20])
        box = torch.cat([corner, corner + 15], dim=1)
        box = box.repeat(1, classes if class_specific else 1)
        boxes.append(box + torch.randn(box.shape, generator=generator) * 2)
        logits = torch.randn(rows, classes + 1, generator=generator) * 2
        probabilities.append(logits.softmax(dim=1))
    return boxes, probabilities


PLAIN, GUIDED = PlainNMS(0.5), GuidedNMS(0.5)


def run(boxes, probabilities, regress=None, branch=None, nms=GUIDED, **settings):
    candidates = [select_boxes(*x, size, 0.05) for *x, size in zip(boxes, probabilities, SIZES)]
    features = [torch.zeros(len(SIZES), 1, 2, 2)]
    return Postprocessor(nms, **settings)(candidates, branch or Branch(), features, regress)


@pytest.mark.parametrize("topk", [-1, 0, 7, 100])
@pytest.mark.parametrize("class_specific", [True, False])
def test_all_off_is_detectron2_to_the_last_bit(class_specific, topk):
    boxes, probabilities = random_outputs(class_specific)
    boxes[0][3, 1] = float("nan")
    probabilities[1][5, 0] = float("inf")
    expected, _ = fast_rcnn_inference(boxes, probabilities, SIZES, 0.05, 0.5, topk)
    found = run(boxes, probabilities, nms=PLAIN, max_detections=topk)
    for a, b in zip(expected, found):
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(b.scores, b.cls_scores)
        assert torch.equal(a.pred_classes, b.pred_classes)
        assert a.image_size == b.image_size
        assert len(a) > 30 or topk in (0, 7)


def iou(a, b):
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


@pytest.mark.parametrize("rank_by", ["iou", "score", "product"])
def test_guided_nms_ranks_by_what_the_key_says_and_the_best_scores_stay(rank_by):
    boxes, probabilities = random_outputs()
    ranking = {"iou": rank_by_iou, "score": None, "product": rank_by_product}[rank_by]
    found = run(boxes, probabilities, nms=GuidedNMS(0.5, ranking), max_detections=9)
    for image, size in enumerate(SIZES):
        x = select_boxes(boxes[image], probabilities[image], size, 0.05)
        lists = [Boxes(torch.zeros(0, 4))] * image + [x.pred_boxes]
        ious = Branch().predict([], lists, x.pred_classes).tolist()
        rows = list(zip(x.pred_boxes.tensor.tolist(), x.scores.tolist(), x.pred_classes, ious))
        key = {
            "iou": lambda row: -row[3],
            "score": lambda row: -row[1],
            "product": lambda row: -row[1] * row[3],
        }[rank_by]
        rows.sort(key=key)
        kept = []
        while rows:
            best = rows[0]
            gone = [r for r in rows[1:] if r[2] == best[2] and iou(r[0], best[0]) > 0.5]
            kept.append((best[0], max([best[1], *(r[1] for r in gone)]), best[3]))
            rows = [r for r in rows[1:] if not any(r is g for g in gone)]
        kept = sorted(kept, key=lambda row: -row[1])[:9]
        torch.testing.assert_close(
            found[image].pred_boxes.tensor, torch.tensor([k[0] for k in kept])
        )
        torch.testing.assert_close(found[image].scores, torch.tensor([k[1] for k in kept]))
        torch.testing.assert_close(found[image].pred_ious, torch.tensor([k[2] for k in kept]))


class JudgesAll(GuidedNMS):
    def needs_iou(self, candidates, limit):
        return torch.ones(len(candidates), dtype=torch.bool)


@pytest.mark.parametrize("ranking", [rank_by_iou, rank_by_product])
@pytest.mark.parametrize("topk", [-1, 5, 40])
def test_boxes_that_are_not_judged_change_nothing(topk, ranking):
    boxes, probabilities = random_outputs()
    settings = {"max_detections": topk, "score_times_iou": True, "calibration": torch.sqrt}
    branches, found = [Branch(), Branch()], []
    for branch, kind in zip(branches, (JudgesAll, GuidedNMS)):
        nms = kind(0.5, ranking)
        found.append(run(boxes, probabilities, branch=branch, nms=nms, **settings))
    for a, b in zip(*found):
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor) and len(a) > 4
        for name in ("scores", "cls_scores", "pred_ious", "pred_classes"):
            assert torch.equal(a.get(name), b.get(name))
    judged = [x.counts[0] for x in branches]
    assert 0 < judged[1] < 0.9 * judged[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_refinement_raises_the_predicted_iou_and_keeps_all_else(mode):
    boxes, probabilities = random_outputs()
    with mode():
        boxes = [x * 1.0 for x in boxes]
        before = run(boxes, probabilities)
        ascent = GradientAscent(steps=20, roll_back=True, early_stop=0.003)
        after = run(boxes, probabilities, refiner=ascent)
        classes = torch.cat([x.pred_classes for x in after])
        expected = Branch().predict([], [x.pred_boxes for x in after], classes)
    torch.testing.assert_close(torch.cat([x.pred_ious for x in after]), expected)
    for a, b, (height, width) in zip(before, after, SIZES):
        assert (b.pred_ious >= a.pred_ious - 1e-6).all()
        assert b.pred_ious.mean() > a.pred_ious.mean() + 0.03
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)
        assert (b.pred_boxes.tensor >= 0).all()
        assert (b.pred_boxes.tensor <= torch.tensor([width, height, width, height])).all()
        assert not b.pred_ious.requires_grad


def test_a_box_keeps_its_level_while_it_moves():
    branch = Branch()
    boxes = [torch.tensor([[10.0, 10, 30.1, 30], [40.0, 40, 59.9, 60]]), torch.zeros(0, 4)]
    probabilities = [torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.zeros(0, 2)]
    ascent = GradientAscent(steps=3, step_size=30.0, early_stop=0.0, max_drop=-1.0)
    found = run(boxes, probabilities, branch=branch, nms=PLAIN, refiner=ascent)
    assert [x.tolist() for x in branch.levels] == [[1, 0]] * 4
    # It would have changed: the areas have crossed the border of the levels.
    assert Pooler().assign_levels([found[0].pred_boxes]).tolist() != [1, 0]
    assert len(found[1]) == 0 and found[1].has("pred_ious")


def test_scores_times_predicted_iou_are_sorted_again():
    boxes, probabilities = random_outputs()
    for x in run(boxes, probabilities, nms=PLAIN, score_times_iou=True):
        torch.testing.assert_close(x.scores, x.cls_scores * x.pred_ious)
        assert torch.equal(x.scores, x.scores.sort(descending=True).values)
        assert not torch.equal(x.cls_scores, x.cls_scores.sort(descending=True).values)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_keeps_more_boxes_with_lower_scores(method):
    boxes, probabilities = random_outputs()
    for plain, soft in zip(
        run(boxes, probabilities, nms=PLAIN, max_detections=-1),
        run(boxes, probabilities, nms=SoftNMS(method, 0.5), max_detections=-1),
    ):
        assert len(soft) > len(plain)
        assert soft.scores[0] == plain.scores[0] and soft.scores.sum() < 2 * plain.scores.sum()


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_lowers_products(method):
    """Against loops in float64."""
    boxes, probabilities = random_outputs()
    nms = SoftNMS(method, 0.5, times_iou=True)
    found = run(boxes, probabilities, nms=nms, max_detections=-1)
    for image, size in enumerate(SIZES):
        x = select_boxes(boxes[image], probabilities[image], size, 0.05)
        lists = [Boxes(torch.zeros(0, 4))] * image + [x.pred_boxes]
        ious = Branch().predict([], lists, x.pred_classes)
        products = (x.scores.double() * ious.double()).tolist()
        left = [
            [*row] for row in zip(products, x.pred_classes.tolist(), x.pred_boxes.tensor.tolist())
        ]
        kept = []
        while left:
            best = max(left, key=lambda row: row[0])
            left.remove(best)
            if best[0] > 0.001:
                kept.append(best)
            for row in left:
                overlap = iou(best[2], row[2]) if row[1] == best[1] else 0
                if method == "gaussian":
                    row[0] *= math.exp(-(overlap**2) / 0.5)
                elif overlap > 0.5:
                    row[0] *= 1 - overlap
        scores, classes, kept_boxes = zip(*kept)
        assert found[image].pred_classes.tolist() == list(classes)
        assert found[image].pred_boxes.tensor.tolist() == list(kept_boxes)
        torch.testing.assert_close(found[image].scores.tolist(), list(scores), rtol=1e-5, atol=1e-7)
        assert torch.equal(found[image].cls_scores, found[image].scores)


def test_iterated_regression_takes_the_place_of_the_ascent():
    calls = []

    def regress(detections):
        calls.append(len(detections))
        for x in detections:
            x.pred_boxes = Boxes(x.pred_boxes.tensor + 1)

    boxes, probabilities = random_outputs()
    plain = run(boxes, probabilities, nms=PLAIN)
    moved = run(boxes, probabilities, regress, nms=PLAIN, refiner=IteratedRegression(3))
    assert calls == [2, 2, 2]
    torch.testing.assert_close(moved[0].pred_boxes.tensor, plain[0].pred_boxes.tensor + 3)
    lists = [x.pred_boxes for x in moved]
    classes = torch.cat([x.pred_classes for x in moved])
    torch.testing.assert_close(
        torch.cat([x.pred_ious for x in moved]), Branch().predict([], lists, classes)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"refiner": GradientAscent()},
        {"nms": PLAIN},
        {"nms": SoftNMS("linear", 0.5)},
        {"nms": SoftNMS("gaussian", 0.5, times_iou=True)},
        {"nms": GuidedNMS(0.5, rank_by_product)},
    ],
)
def test_images_without_a_candidate(settings):
    empty = [torch.zeros(0, 12)] * 2, [torch.zeros(0, 4)] * 2
    for x in run(*empty, **settings):
        assert isinstance(x, Instances) and len(x) == 0
        assert x.pred_boxes.tensor.shape == (0, 4) and x.pred_ious.shape == (0,)


@pytest.mark.parametrize("by", ["ascent", "regression"])
def test_fewer_steps_than_none_are_refused(by):
    steps = ["MODEL.IOU_NET.REFINE_BY", by, "MODEL.IOU_NET.REFINE_STEPS", "-1"]
    with pytest.raises(InputError, match="MODEL.IOU_NET.REFINE_STEPS is at least 0, but it is -1"):
        build_postprocessor(get_config("quick/iou_net_shapes", steps))
