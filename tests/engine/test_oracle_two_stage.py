"""Oracles of R-CNNs and of IoU-Net."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from assign_by_hand import iou_by_hand
from iou_d2.engine.oracle import editor_of
from iou_d2.engine.oracle.evaluation import NOTHING, OracleModel, plan
from iou_d2.engine.oracle.oracles import (
    ORACLES,
    gt_bbox,
    gt_cls,
    gt_cls_iou,
    gt_ctr_iou,
    gt_iou_rank,
)
from iou_d2.engine.oracle.two_stage import TrueIoU
from iou_d2.errors import InputError
from oracle_scene import Scene

CASCADE = (
    "MODEL.ROI_HEADS.NAME",
    "BoxLossCascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
    "True",
)
RES5 = (
    *("MODEL.RESNETS.NORM", "BN", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "40", "MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 32, 64]]"),
    *(
        "MODEL.IOU_NET.REFINE_STEPS",
        "0",
    ),
)
KINDS = {
    "res5": ("iou_net_R_50_C4_1x", RES5),
    "faster": ("quick/faster_rcnn_shapes", ()),
    "cascade": ("quick/faster_rcnn_shapes", CASCADE),
    "iou_net": ("quick/iou_net_shapes", ("MODEL.IOU_NET.REFINE_ROLL_BACK", "True")),
}


def with_good_proposals(predictions, editor, truth):
    """A random RPN finds nothing: the first proposals become objects that are moved a bit."""
    proposals = []
    for objects in truth:
        boxes = objects.gt_boxes.tensor
        moved = torch.cat([boxes + shift for shift in (-1.5, 1.5, 2.0)])
        far = torch.tensor([[0.0, 0, 5, 5], [80, 80, 96, 96]])
        proposals.append(
            Instances(objects.image_size, proposal_boxes=Boxes(torch.cat([moved, far])))
        )
        proposals[-1].objectness_logits = torch.zeros(len(proposals[-1]))
    boxes, probabilities = editor.heads.regress(predictions.features, proposals)
    return predictions._replace(
        proposals=proposals, boxes=list(boxes), probabilities=list(probabilities)
    )


def scene_of(cfg, batch):
    torch.manual_seed(0)
    truth = [x["instances"] for x in batch]
    return Scene(
        build_model(cfg).eval(),
        batch,
        lambda predictions, editor: with_good_proposals(predictions, editor, truth),
    )


@pytest.fixture
def make_scene(small_cfg, make_batch):
    def make(kind, objects=(2, 1)):
        name, overrides = KINDS[kind]
        few = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.ROI_HEADS.NUM_CLASSES", "3")
        cfg = small_cfg(f"configs/{name}.yaml", *few, *overrides)
        return scene_of(cfg, make_batch(list(objects)))

    return make


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert len(a) == len(b) > 0
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_row_of_nothing_is_the_detector(make_scene, kind):
    scene = make_scene(kind)
    rows, _ = plan(scene.editor, list(ORACLES))
    outputs = OracleModel(scene.model, scene.editor, rows)(scene.batch)
    row = next(x for x in rows if x.name == NOTHING and x.with_quality == scene.editor.has_quality)
    with torch.no_grad():
        expected = [x["instances"] for x in scene.model(scene.batch)]
    assert_same([x[row.folder]["instances"] for x in outputs], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_overwritten_are_the_proposals_on_objects_alone(make_scene, kind):
    scene = make_scene(kind)
    expected = [
        (image, index, int(truth.gt_classes[number]))
        for image, (truth, x) in enumerate(zip(scene.truth, scene.predictions.proposals))
        for index, box in enumerate(x.proposal_boxes.tensor.tolist())
        for number, object_ in enumerate(truth.gt_boxes.tensor.tolist())
        if iou_by_hand(box, object_) >= 0.5
    ]
    assert list(zip(*(x.tolist() for x in scene.foreground[:3]))) == expected
    before, after = scene.predictions.probabilities, scene.apply(gt_cls).probabilities
    for place in expected:
        assert after[place[0]][place[1:]] == 1
        after[place[0]][place[1:]] = before[place[0]][place[1:]]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("kind", KINDS)
def test_true_boxes_have_an_iou_of_1(make_scene, kind):
    scene = make_scene(kind)
    one, other = (scene.apply(gt_bbox, x).probabilities for x in (gt_cls, gt_cls_iou))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(one, other))
    assert any((a - b).abs().max() > 0.01 for a, b in zip(one, scene.apply(gt_cls_iou)[3]))
    predictions = scene.editor.without_quality(scene.apply(gt_bbox, gt_cls))
    for found, truth in zip(scene.detect(predictions), scene.truth):
        first = found[: len(truth)]
        assert (first.scores == 1).all()
        assert sorted(first.pred_boxes.tensor.tolist()) == sorted(truth.gt_boxes.tensor.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_without_objects_oracles_leave_all_as_it_is(make_scene, kind):
    scene = make_scene(kind, (0, 0))
    plain = scene.detect(scene.predictions)
    for oracle in (gt_bbox, gt_cls, gt_cls_iou):
        assert_same(scene.detect(scene.apply(oracle)), plain)


def test_the_true_iou_is_that_of_the_best_object_of_the_class():
    truth = Instances((50, 50), gt_boxes=Boxes([[0, 0, 10, 10.0], [0, 0, 10, 20], [0, 0, 5, 5]]))
    truth.gt_classes = torch.tensor([0, 0, 1])
    boxes = torch.tensor([[0, 0, 10, 16.0], [0, 0, 10, 10], [0, 0, 10, 10]], requires_grad=True)
    none = Instances((50, 50), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0))
    branch = TrueIoU([truth, none])
    classes = torch.tensor([0, 1, 2, 0])
    found = branch.predict([], [Boxes(boxes), Boxes([[0, 0, 1, 1.0]])], classes)
    assert found.tolist() == pytest.approx([0.8, 0.25, 0, 0])
    (gradient,) = torch.autograd.grad(found.sum(), boxes)
    assert gradient[0].tolist() == pytest.approx([0, 0, 0, 0.05], abs=0.05) and gradient[0, 3] > 0
    assert (gradient[2] == 0).all()


def best_ious(scene, detections) -> list[float]:
    """Of the boxes of the class of the one object of each image the highest IoU with it."""
    return [
        max(
            iou_by_hand(box, truth.gt_boxes.tensor[0].tolist())
            for box in found.pred_boxes.tensor[found.pred_classes == truth.gt_classes].tolist()
        )
        for found, truth in zip(detections, scene.truth)
    ]


def test_guided_by_the_true_iou_the_best_box_of_an_object_stays(make_scene):
    scene = make_scene("faster", (1, 1))
    found = scene.detect(scene.apply(gt_iou_rank))
    ious = best_ious(scene, found)
    assert ious == best_ious(scene, scene.editor.candidates(scene.predictions))
    assert min(ious) > 0.5 and all(x.has("pred_ious") for x in found)


def test_a_perfect_branch_refines_towards_the_objects(make_scene):
    # Without rolling back, a step of the ascent leaves an optimum whose gradient does not vanish.
    scene = make_scene("iou_net", (1, 1))
    assert scene.model.roi_heads.postprocessor.refiner is not None
    edited = scene.detect(scene.apply(gt_ctr_iou))
    still = scene.detect(scene.apply(gt_iou_rank))
    ious = torch.tensor([best_ious(scene, found) for found in (edited, still)])  # (2, images)
    assert (ious[0] >= ious[1]).all() and ious[0].sum() > ious[1].sum() + 0.01


def test_what_has_no_meaning_is_left_out(make_scene, small_cfg):
    rows, left_out = plan(make_scene("faster").editor, list(ORACLES))
    assert set(left_out) == {"gt_ctr", "gt_ctr_iou"} and "gt_iou_rank" in [x.name for x in rows]
    rows, left_out = plan(make_scene("iou_net").editor, list(ORACLES))
    assert set(left_out) == {"gt_ctr"}
    cfg = small_cfg(
        "configs/quick/faster_rcnn_shapes.yaml", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"
    )
    with pytest.raises(InputError, match="set MODEL.ROI_HEADS.NAME to BoxLossROIHeads"):
        editor_of(build_model(cfg))
    without_rpn = ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    cfg = small_cfg("configs/quick/faster_rcnn_shapes.yaml", *without_rpn)
    with pytest.raises(InputError, match="needs an RPN"):
        editor_of(build_model(cfg))
