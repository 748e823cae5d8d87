"""The smooth L1 of Faster R-CNN's two stages, by the keys SMOOTH_L1_BETA: Eqn. 3 of Fast R-CNN
(arXiv 1504.08083), which turns at 1, in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes

CONFIG = "faster_rcnn_R_50_FPN_1x_smooth_l1"
HEADS = ("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_HEADS.NUM_CLASSES", "3")
BOTH_1 = ("MODEL.RPN.SMOOTH_L1_BETA", "1.0")
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "BoxLossCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
)


def smooth_l1(error: float, beta: float) -> float:
    error = abs(error)
    return 0.5 * error * error / beta if error < beta else error - 0.5 * beta


def expected_deltas(box, target, weights):
    """Eqn. 2 of arXiv 1506.01497, times the weights of the deltas."""
    w, h = box[2] - box[0], box[3] - box[1]
    shift = [(target[i] + target[i + 2] - box[i] - box[i + 2]) / 2 for i in (0, 1)]
    sides = [(target[2] - target[0]) / w, (target[3] - target[1]) / h]
    deltas = [shift[0] / w, shift[1] / h, math.log(sides[0]), math.log(sides[1])]
    return [delta * weight for delta, weight in zip(deltas, weights)]


def loss_by_hand(deltas, box, target, weights, beta):
    expected = expected_deltas(box, target, weights)
    return sum(smooth_l1(d - e, beta) for d, e in zip(deltas, expected))


def random_boxes(count):
    corner = torch.rand(count, 2) * 80
    return torch.cat([corner, corner + 10 + torch.rand(count, 2) * 30], dim=1)


def lists(*tensors):
    return [x.double().tolist() for x in tensors]


@pytest.fixture
def build(small_cfg):
    def make(*overrides):
        torch.manual_seed(0)
        return build_model(small_cfg(CONFIG, *HEADS, *overrides))

    return make


@pytest.mark.parametrize(("overrides", "beta"), [(BOTH_1, 1.0), ((), 0.1111)], ids=["1", "1/9"])
def test_the_rpn_equals_the_closed_form(build, event_storage, overrides, beta):
    rpn = build(*overrides).proposal_generator
    anchors, logits = random_boxes(40), torch.randn(2, 40)
    deltas = torch.randn(2, 40, 4).requires_grad_()
    labels = [torch.randint(-1, 2, (40,)) for _ in range(2)]
    targets = [anchors + torch.randn(40, 4) * 3 for _ in range(2)]
    found = rpn.losses([Boxes(anchors)], [logits], labels, [deltas], targets)["loss_rpn_loc"]
    rows = [
        (deltas[image, i].detach(), anchors[i], targets[image][i])
        for image in range(2)
        for i in range(40)
        if labels[image][i] == 1
    ]
    total = sum(loss_by_hand(*lists(*row), (1, 1, 1, 1), beta) for row in rows)
    assert found.item() == pytest.approx(total / 2 / 256, rel=1e-5)
    found.backward()
    for image in range(2):  # the slope is that of the error up to beta, and 1 from there on
        slopes = deltas.grad[image].abs() * 2 * 256
        assert (slopes <= 1 + 1e-5).all() and (slopes[labels[image] != 1] == 0).all()


@pytest.mark.parametrize("overrides", [(), CASCADE], ids=["standard", "cascade"])
def test_the_box_heads_equal_the_closed_form(build, overrides):
    predictors = build(*overrides).roi_heads.box_predictor
    for layers in predictors if overrides else [predictors]:
        weights, columns = layers.box2box_transform.weights, 1 if overrides else 3
        proposals, labels = random_boxes(60), torch.randint(0, 4, (60,))
        targets = proposals + torch.randn(60, 4)
        deltas = torch.randn(60, 4 * columns)
        total = 0.0
        for i, label in enumerate(labels.tolist()):
            if label < 3:
                own = deltas[i].view(columns, 4)[label if columns == 3 else 0]
                total += loss_by_hand(*lists(own, proposals[i], targets[i]), weights, 1.0)
        found = layers.box_reg_loss(proposals, targets, deltas, labels)
        assert found.item() == pytest.approx(total / 60, rel=1e-5)


def test_both_betas_are_used_in_a_step(build, make_batch, event_storage):
    """A beta that a key changes changes the loss of its stage, and of no other one."""
    losses = []
    for overrides in ((), BOTH_1, ("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "0.0")):
        model = build("MODEL.RESNETS.NORM", "BN", *overrides).train()
        torch.manual_seed(1)
        losses.append({name: loss.item() for name, loss in model(make_batch([3, 2])).items()})
    plain, rpn, heads = losses
    changed = [{name for name in plain if other[name] != plain[name]} for other in (rpn, heads)]
    assert changed == [{"loss_rpn_loc"}, {"loss_box_reg"}]
