from __future__ import annotations

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import BitMasks, Boxes

from iou_d2.detectors.faster_rcnn import BoxLossOutputLayers
from iou_d2.ops.box_losses import KINDS, build_box_loss

PLAIN = "configs/faster_rcnn_R_50_FPN_1x.yaml"
IOU_NET = "configs/iou_net_R_50_FPN_1x.yaml"
SMALL = (
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_HEADS.NUM_CLASSES", "3"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32", "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "0.3"),
    *("MODEL.RPN.SMOOTH_L1_BETA", "0.2", "MODEL.IOU_NET.ROIS_PER_IMAGE", "20"),
    # Frozen batch norm would let the random backbone overflow.
    *("MODEL.RESNETS.NORM", "BN"),
)
STOCK = ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads")
WEIGHT_2 = ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", "2.0")
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "BoxLossCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
)


def kinds(kind):
    return "MODEL.RPN.BBOX_REG_LOSS_TYPE", kind, "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", kind


@pytest.fixture
def build(small_cfg):
    """A function: overrides -> a small Faster R-CNN, always with the same random weights."""

    def make(*overrides: str, config_file: str = PLAIN):
        torch.manual_seed(0)
        return build_model(small_cfg(config_file, *SMALL, *overrides)).train()

    return make


def losses_of(model, batch):
    torch.manual_seed(1)  # what samples anchors and proposals
    return model(batch)


def with_masks(batch):
    for image in batch:
        masks = torch.ones(len(image["instances"]), *image["image"].shape[1:], dtype=torch.bool)
        image["instances"].gt_masks = BitMasks(masks)
    return batch


@pytest.mark.parametrize("objects", [[3, 2], [0, 4], [0, 0]], ids=str)
@pytest.mark.parametrize("agnostic", ["True", "False"])
@pytest.mark.parametrize("kind", ["smooth_l1", "giou"])
def test_losses_and_gradients_equal_detectron2s(
    build, make_batch, event_storage, kind, agnostic, objects
):
    settings = *kinds(kind), "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic
    weights = "MODEL.RPN.BBOX_REG_LOSS_WEIGHT", "3.0", *WEIGHT_2
    ours, stock = build(*settings, *weights), build(*settings, *weights, *STOCK)
    found, expected = (losses_of(model, make_batch(objects)) for model in (ours, stock))
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)
    for losses in (found, expected):
        (losses["loss_rpn_loc"] + losses["loss_box_reg"]).backward()
    for a, b in zip(ours.parameters(), stock.parameters()):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mask", ["True", "False"])
def test_a_seed_gives_the_weights_that_it_gives_to_detectron2(build, mask):
    ours, stock = build("MODEL.MASK_ON", mask), build("MODEL.MASK_ON", mask, *STOCK)
    own, others = ours.state_dict(), stock.state_dict()
    assert list(own) == list(others)
    assert all(torch.equal(own[name], others[name]) for name in own)


@pytest.mark.parametrize("objects", [[3, 2], [0, 4], [0, 0]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_finite_and_reach_every_parameter(
    build, make_batch, event_storage, kind, objects
):
    model = build(*kinds(kind))
    losses = model(make_batch(objects))
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    (losses["loss_rpn_loc"] + losses["loss_box_reg"]).backward()
    rpn, heads = model.proposal_generator.rpn_head, model.roi_heads
    for layer in (rpn.anchor_deltas, heads.box_predictor.bbox_pred):
        for parameter in layer.parameters():
            assert torch.isfinite(parameter.grad).all()
            assert (parameter.grad != 0).any() == (sum(objects) > 0)
    assert (losses["loss_rpn_loc"] > 0) == (losses["loss_box_reg"] > 0) == (sum(objects) > 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config_file", [PLAIN, IOU_NET])
@pytest.mark.parametrize("overrides", [(), CASCADE], ids=["standard", "cascade"])
def test_every_kind_of_heads_trains_a_step(
    build, make_batch, event_storage, kind, config_file, overrides
):
    if overrides and config_file == IOU_NET:
        overrides = (*overrides, "MODEL.ROI_HEADS.NAME", "IoUNetCascadeROIHeads")
    model = build(*kinds(kind), *overrides, config_file=config_file)
    predictors = [m for m in model.modules() if isinstance(m, FastRCNNOutputLayers)]
    assert len(predictors) == (3 if overrides else 1)
    assert all(isinstance(x, BoxLossOutputLayers) for x in predictors)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        losses = model(make_batch([3, 0]))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_stages_of_a_cascade_keep_their_transforms(build):
    stages = build(*CASCADE).roi_heads.box_predictor
    assert [stage.box2box_transform.weights[0] for stage in stages] == [10, 20, 30]
    assert [stage.box2box_transform.weights[2] for stage in stages] == [5, 10, 15]


def test_masks_and_own_box_losses(build, make_batch, event_storage):
    losses = build("MODEL.MASK_ON", "True", *kinds("diou"))(with_masks(make_batch([2, 1])))
    assert "loss_mask" in losses and all(torch.isfinite(x) for x in losses.values())


def iou_of(delta, anchor, target, weights):
    """IoU of the decoded box with its target, in Python floats."""
    dx, dy, dw, dh = (d / weight for d, weight in zip(delta, weights))
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = anchor[0] + w / 2 + dx * w, anchor[1] + h / 2 + dy * h
    w, h = w * math.exp(dw), h * math.exp(dh)
    width = min(x + w / 2, target[2]) - max(x - w / 2, target[0])
    height = min(y + h / 2, target[3]) - max(y - h / 2, target[1])
    inner = max(width, 0) * max(height, 0)
    return inner / (w * h + (target[2] - target[0]) * (target[3] - target[1]) - inner)


def random_boxes(count):
    corner = torch.rand(count, 2) * 80
    return torch.cat([corner, corner + 10 + torch.rand(count, 2) * 30], dim=1)


@pytest.mark.parametrize("agnostic", [True, False])
def test_loss_of_proposals_equals_a_loop(agnostic):
    torch.manual_seed(0)
    weights, classes = (10.0, 10.0, 5.0, 5.0), 4
    layers = BoxLossOutputLayers(
        8,
        box2box_transform=Box2BoxTransform(weights),
        num_classes=classes,
        cls_agnostic_bbox_reg=agnostic,
        box_loss=build_box_loss("iou", 0.0, "KEY"),
    )
    proposals = random_boxes(40)
    targets = proposals + torch.randn(40, 4) * 2
    labels = torch.randint(0, classes + 1, (40,))
    deltas = torch.randn(40, 4 if agnostic else 4 * classes)
    total = 0.0
    for i, label in enumerate(labels.tolist()):
        if label < classes:
            own = deltas[i] if agnostic else deltas[i, 4 * label : 4 * label + 4]
            own, proposal, target = (x.double().tolist() for x in (own, proposals[i], targets[i]))
            total += 1 - iou_of(own, proposal, target, weights)
    found = layers.box_reg_loss(proposals, targets, deltas, labels)
    assert found.item() == pytest.approx(total / 40, rel=1e-5)


def test_loss_of_anchors_equals_a_loop(build, event_storage):
    torch.manual_seed(0)
    rpn = build("MODEL.RPN.BBOX_REG_LOSS_TYPE", "iou").proposal_generator
    sizes = [12, 5]  # of two levels, for two images
    anchors = [random_boxes(size) for size in sizes]
    logits = [torch.randn(2, size) for size in sizes]
    deltas = [torch.randn(2, size, 4) * 0.3 for size in sizes]
    labels = [torch.randint(-1, 2, (17,)) for _ in range(2)]
    targets = [torch.cat(anchors) + torch.randn(17, 4) for _ in range(2)]
    total = 0.0
    for image in range(2):
        for i in range(17):
            if labels[image][i] == 1:
                level, index = (0, i) if i < 12 else (1, i - 12)
                delta, anchor = deltas[level][image, index], anchors[level][index]
                box, anchor, target = (
                    x.double().tolist() for x in (delta, anchor, targets[image][i])
                )
                total += 1 - iou_of(box, anchor, target, (1, 1, 1, 1))
    boxes = [Boxes(x) for x in anchors]
    found = rpn.losses(boxes, logits, labels, deltas, targets)["loss_rpn_loc"]
    assert total > 1
    assert found.item() == pytest.approx(total / (2 * rpn.batch_size_per_image), rel=1e-5)


@pytest.mark.parametrize("node", ["RPN", "ROI_BOX_HEAD"])
def test_an_unknown_loss_names_the_key_and_the_valid_values(build, node):
    key = f"MODEL.{node}.BBOX_REG_LOSS_TYPE"
    with pytest.raises(ValueError, match=f"{key} is one of smooth_l1, l2, iou, .* is 'huber'"):
        build(key, "huber")
