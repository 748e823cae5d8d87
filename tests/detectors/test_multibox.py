"""Matching, mining and loss of SSD against loops and sorts by hand."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torchvision.ops import box_iou

from iou_d2 import get_config
from iou_d2.detectors.multibox import (
    IGNORED,
    MultiBoxLoss,
    MultiBoxMatcher,
    bipartite_match,
    build_matcher,
    hard_negatives,
)
from iou_d2.detectors.multibox_inference import SoftNMS, best_of_classes, build_multibox_nms
from iou_d2.errors import InputError
from iou_d2.ops.box_losses import SmoothL1Loss
from iou_d2.ops.nms import soft_nms
from multibox_by_hand import loss_by_hand, match_by_hand

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def random_boxes(count: int, generator: torch.Generator, side: float = 60) -> torch.Tensor:
    corner = torch.rand(count, 2, generator=generator) * side
    return torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=generator) * 30], dim=1)


def truth_of(boxes: torch.Tensor, classes: list[int]) -> Instances:
    return Instances((100, 100), gt_boxes=Boxes(boxes), gt_classes=torch.tensor(classes).long())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("thresholds", [(0.5, 0.5), (0.3, 0.7)])
def test_matching_is_that_of_loops(seed, thresholds):
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(120, generator)
    # More objects than can be matched well, some of them near each other and so rivals.
    truth = random_boxes(9, generator)
    near = truth[:4] + torch.tensor([0.5, 0.4, 0.9, 1.3])
    truth = torch.cat([truth, near, torch.tensor([[200.0, 200, 220, 220]])])
    negative, positive = thresholds
    iou = box_iou(truth.double(), boxes.double()).tolist()
    expected, background = match_by_hand(iou, positive, negative)
    match, is_background = MultiBoxMatcher(positive, negative)(boxes, truth)
    assert [None if x < 0 else x for x in match.tolist()] == expected
    assert is_background.tolist() == background
    assert 13 not in expected  # overlaps no box
    assert len(set(expected) - {None}) == 13


def test_of_rivals_for_a_box_the_better_one_gets_it_and_the_other_its_next():
    iou = torch.tensor([[0.3, 0.8, 0.4], [0.0, 0.9, 0.2], [0.0, 0.0, 0.0]])
    objects, boxes = bipartite_match(iou)
    assert dict(zip(objects.tolist(), boxes.tolist())) == {1: 1, 0: 2}


def test_more_objects_than_boxes():
    objects, boxes = bipartite_match(torch.rand(7, 2) + 0.1)
    assert len(set(objects.tolist())) == 2 and sorted(boxes.tolist()) == [0, 1]


def test_matching_of_nothing_and_of_what_is_not_finite():
    boxes = random_boxes(5, torch.Generator().manual_seed(0))
    match, background = MultiBoxMatcher()(boxes, torch.zeros(0, 4))
    assert match.tolist() == [-1] * 5 and background.all()
    truth = torch.stack([torch.full((4,), float("nan")), boxes[2]])
    match, background = MultiBoxMatcher()(boxes, truth)
    assert match[2] == 1 and not (match == 0).any()
    boxes[2] = float("inf")
    match, background = MultiBoxMatcher()(boxes, truth)
    assert match[2] == -1 and background[2]


def test_mining_is_a_sort_by_hand():
    generator = torch.Generator().manual_seed(0)
    loss = torch.randn(4, 50, generator=generator)
    eligible = torch.rand(4, 50, generator=generator) > 0.4
    counts = [0, 7, 50, 3]
    found = hard_negatives(loss, eligible, torch.tensor(counts))
    for row, count in enumerate(counts):
        order = sorted(range(50), key=lambda i: -loss[row, i].item())
        kept = [i for i in order if eligible[row, i]][:count]
        assert found[row].nonzero().flatten().tolist() == sorted(kept)


def test_of_equal_losses_as_many_are_kept_as_asked_for():
    found = hard_negatives(torch.zeros(1, 9), torch.ones(1, 9).bool(), torch.tensor([4]))
    assert found.sum() == 4


@pytest.mark.parametrize("without", [0, 5])
def test_the_loss_is_that_of_loops(without):
    generator = torch.Generator().manual_seed(3)
    anchors = random_boxes(80, generator).expand(3, -1, -1)
    logits = torch.randn(3, 80, 4, generator=generator)
    deltas = torch.randn(3, 80, 4, generator=generator)
    truths = [
        truth_of(random_boxes(3, generator), [0, 2, 1]),
        truth_of(torch.zeros(0, 4), []),
        truth_of(random_boxes(1, generator), [1]),
    ]
    loss = MultiBoxLoss(
        MultiBoxMatcher(), Box2BoxTransform(WEIGHTS), SmoothL1Loss(1.0), 3.0, without
    )
    terms = loss(anchors, logits, deltas, loss.assign(anchors, truths, 3))
    cls, box, count = loss_by_hand(anchors, logits, deltas, truths, without=without)
    assert terms.count == count > 3
    assert terms.cls.item() == pytest.approx(cls, rel=1e-5)
    assert terms.box.item() == pytest.approx(box, rel=1e-5)


def test_labels_between_the_thresholds_are_ignored():
    anchors = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 2], [50, 50, 60, 60]]])
    loss = MultiBoxLoss(MultiBoxMatcher(0.7, 0.3), Box2BoxTransform(WEIGHTS), SmoothL1Loss(1.0))
    found = loss.assign(anchors, [truth_of(torch.tensor([[0.0, 0, 10, 10]]), [1])], 3)
    assert found.labels.tolist() == [[1, IGNORED, 3, 3]]
    assert found.positive(3).tolist() == [[True, False, False, False]]


def test_a_class_beyond_those_of_the_config_is_named():
    loss = MultiBoxLoss(MultiBoxMatcher(), Box2BoxTransform(WEIGHTS), SmoothL1Loss(1.0))
    truth = truth_of(torch.tensor([[0.0, 0, 10, 10]]), [3])
    with pytest.raises(ValueError, match="class 3, but MODEL.RETINANET.NUM_CLASSES is 3"):
        loss.assign(torch.zeros(1, 5, 4), [truth], 3)


@pytest.mark.parametrize("value", [[0.5], [0.7, 0.3], [0.0, 0.5], [0.5, 1.5]])
def test_wrong_thresholds_are_named(value):
    with pytest.raises(InputError, match="KEY is two rising IoUs"):
        build_matcher(value, "KEY")


def test_candidates_are_the_best_of_each_class():
    scores = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    scores[:, 2] *= 0.1
    found = best_of_classes(scores, 0.08, 7)
    pairs = set(zip(found.anchors.tolist(), found.classes.tolist()))
    expected = set()
    for k in range(3):
        best = sorted(range(40), key=lambda i: -scores[i, k].item())[:7]
        expected |= {(i, k) for i in best if scores[i, k] > 0.08}
    assert pairs == expected and len(pairs) == len(found.anchors) > 14
    assert len(best_of_classes(torch.full((5, 2), float("nan")), 0.01, 3).anchors) == 0
    assert len(best_of_classes(torch.zeros(0, 2), 0.01, 3).anchors) == 0


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_stops_at_the_detections_of_an_image(method):
    generator = torch.Generator().manual_seed(0)
    boxes, scores = random_boxes(60, generator), torch.rand(60, generator=generator)
    classes = torch.randint(3, (60,), generator=generator)
    levels = [
        Instances((100, 100), pred_boxes=Boxes(b), scores=s, pred_classes=c)
        for b, s, c in zip(boxes.split(30), scores.split(30), classes.split(30))
    ]
    keep, expected = soft_nms(boxes, scores, classes, method, threshold=0.3)
    found = SoftNMS(0.01, 400, 0.3, 12, method)(levels)
    assert torch.equal(found.scores, expected[:12])
    assert torch.equal(found.pred_boxes.tensor, boxes[keep[:12]])
    assert len(SoftNMS(0.01, 400, 0.3, -1, method)(levels)) == len(keep) > 12


def test_the_key_of_nms():
    cfg = get_config("quick/ssd_shapes")
    assert build_multibox_nms(cfg).nms_threshold == 0.45
    cfg.MODEL.MULTIBOX.NMS = "soft_linear"
    assert build_multibox_nms(cfg) == SoftNMS(0.01, 400, 0.45, 100, "linear")
    cfg.MODEL.MULTIBOX.NMS = "matrix"
    with pytest.raises(InputError, match="MODEL.MULTIBOX.NMS is one of hard, soft_linear"):
        build_multibox_nms(cfg)
