"""C4 heads beside Detectron2's, and IoU-Net on the single map."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes

from excited import excite

C4 = "configs/faster_rcnn_R_50_C4_1x.yaml"
IOU_NET = "configs/iou_net_R_50_C4_1x.yaml"
ALIGN = ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2")
STOCK = ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.ROI_HEADS.NAME", "Res5ROIHeads", *ALIGN)
CLIMB = ("MODEL.IOU_NET.REFINE_EARLY_STOP", "0.0", "MODEL.IOU_NET.REFINE_ROLL_BACK", "True")
REST = ("MODEL.IOU_NET.REFINE_STEPS", "0")
SMALL = (
    *("MODEL.RESNETS.NORM", "BN", "MODEL.ROI_HEADS.NUM_CLASSES", "3"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "40", "MODEL.IOU_NET.ROIS_PER_IMAGE", "16"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 32, 64]]", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
)


@pytest.fixture
def build(small_cfg):
    """A function: overrides -> a small model, always with the same random weights."""

    def make(*overrides, config_file=C4):
        torch.manual_seed(0)
        return build_model(small_cfg(config_file, *SMALL, *overrides))

    return make


def losses_of(model, batch):
    torch.manual_seed(1)  # what samples anchors and proposals
    return model.train()(batch)


def detect(model, batch):
    with torch.no_grad():
        return [x["instances"] for x in model.eval()(batch)]


def with_masks(batch):
    for image in batch:
        masks = torch.ones(len(image["instances"]), *image["image"].shape[1:], dtype=torch.bool)
        image["instances"].gt_masks = BitMasks(masks)
    return batch


@pytest.mark.parametrize("mask", ["False", "True"])
def test_losses_and_detections_equal_detectron2s(build, make_batch, event_storage, mask):
    ours, stock = build("MODEL.MASK_ON", mask), build("MODEL.MASK_ON", mask, *STOCK)
    own, others = ours.state_dict(), stock.state_dict()
    assert list(own) == list(others)
    assert all(torch.equal(own[name], others[name]) for name in own)
    batch = with_masks(make_batch([3, 0, 1]))
    found, expected = losses_of(ours, batch), losses_of(stock, batch)
    assert set(found) == set(expected) and ("loss_mask" in found) == (mask == "True")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)
    for a, b in zip(detect(excite(ours), batch), detect(excite(stock), batch)):
        assert len(a) > 10 and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)
        assert mask == "False" or torch.equal(a.pred_masks, b.pred_masks)


def test_nine_anchors_lie_at_one_stride(small_cfg):
    generator = build_model(small_cfg(C4)).proposal_generator.anchor_generator
    assert generator.num_anchors == [9] and list(generator.strides) == [16]
    (anchors,) = generator.cell_anchors
    sides = anchors[:, 2:] - anchors[:, :2]
    areas = sides.prod(dim=1).sqrt().round().tolist()
    assert sorted(areas) == [128] * 3 + [256] * 3 + [512] * 3


def test_weights_of_detectron2_load_and_only_the_iou_branch_is_new(build):
    plain, model = build(*STOCK), build(config_file=IOU_NET)
    loaded = model.load_state_dict(plain.state_dict(), strict=False)
    expected = [
        f"roi_heads.iou_branch.{x}.{y}"
        for x in ("head.fc1", "head.fc2", "iou_pred")
        for y in ("bias", "weight")
    ]
    assert sorted(loaded.missing_keys) == expected and loaded.unexpected_keys == []


@pytest.mark.parametrize("objects", [[3, 2], [0, 4], [0, 0]], ids=str)
def test_losses_are_finite_and_reach_every_parameter(build, make_batch, event_storage, objects):
    model = excite(build(config_file=IOU_NET))
    losses = losses_of(model, make_batch(objects))
    assert (losses["loss_iou"] > 0) == (sum(objects) > 0)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name


def test_the_branch_reads_res5_of_the_box_and_trains_it(build, make_batch):
    model = excite(build(config_file=IOU_NET)).eval()
    heads = model.roi_heads
    images = model.preprocess_image(make_batch([0]))
    features = model.backbone(images.tensor)
    boxes, classes = torch.tensor([[10.0, 12, 70, 60], [30, 5, 90, 94]]), torch.tensor([2, 0])
    pooled = heads.res5(heads.pooler([features["res4"]], [Boxes(boxes)])).mean(dim=(2, 3))
    branch = heads.iou_branch
    hidden = pooled
    for layer in (branch.head.fc1, branch.head.fc2):
        hidden = (hidden @ layer.weight.t() + layer.bias).clamp(min=0)
    outputs = hidden @ branch.iou_pred.weight.t() + branch.iou_pred.bias
    found = branch(heads.levels(features), [Boxes(boxes)], classes)
    torch.testing.assert_close(found, outputs[[0, 1], [2, 0]])
    found.sum().backward()
    assert all((p.grad != 0).any() for name, p in heads.res5.named_parameters())
    assert not [name for name, _ in branch.named_parameters() if "res5" in name]


def test_a_copy_runs_its_own_res5(build, make_batch):
    model = excite(build(config_file=IOU_NET))
    other = copy.deepcopy(model)
    before = detect(other, make_batch([0]))[0]
    for parameter in model.roi_heads.res5.parameters():
        parameter.data.zero_()
    after = detect(other, make_batch([0]))[0]
    assert len(before) > 5 and torch.equal(before.pred_ious, after.pred_ious)


def test_predicted_iou_has_the_gradient_of_finite_differences(build):
    model = excite(build(config_file=IOU_NET)).eval().double()
    heads = model.roi_heads
    features = model.backbone(torch.rand(1, 3, 96, 96, dtype=torch.float64))["res4"].detach()
    branch = heads.iou_branch

    def by_layers(box):
        rois = torch.cat([box.new_zeros(1, 1), box], dim=1)
        of_box = heads.res5(heads.pooler.level_poolers[0](features, rois)).mean(dim=(2, 3))
        return (branch.iou_pred(branch.head(of_box))[0, 1] + 1) / 2

    box = torch.tensor([[20.3, 15.1, 71.7, 64.2]], dtype=torch.float64)
    with torch.no_grad():
        steps = torch.eye(4, dtype=torch.float64)[:, None] * 1e-5
        expected = torch.stack([(by_layers(box + d) - by_layers(box - d)) / 2e-5 for d in steps])
    model.float()
    moving = box.float().requires_grad_()
    iou = branch.predict([features.float()], [Boxes(moving)], torch.tensor([1]))
    (gradient,) = torch.autograd.grad(iou.sum(), moving)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(gradient[0].double(), expected, rtol=1e-2, atol=1e-5)


# Behind the single map of res4: res5 once a box, or fully connected layers.
ON_ONE_MAP = [(), ("MODEL.ROI_HEADS.NAME", "IoUNetROIHeads")]


@pytest.mark.parametrize("overrides", ON_ONE_MAP, ids=["res5", "fc"])
def test_guided_nms_and_refinement_on_a_single_map(build, make_batch, event_storage, overrides):
    model = excite(build(*overrides, *CLIMB, config_file=IOU_NET))
    assert all(x.isfinite() for x in losses_of(model, make_batch([2, 0])).values())
    start = excite(build(*overrides, *REST, config_file=IOU_NET))
    start.load_state_dict(model.state_dict())
    batch = make_batch([0, 0], side=128)
    moved = 0
    for before, after in zip(detect(start, batch), detect(model, batch)):
        assert len(before) == len(after) > 5 and torch.equal(before.scores, after.scores)
        assert (after.pred_ious >= before.pred_ious - 1e-5).all()
        moved += (after.pred_boxes.tensor != before.pred_boxes.tensor).any(dim=1).sum()
    assert moved > 5


def test_standalone_training_leaves_res5_as_it_is(build, make_batch):
    model = build("MODEL.META_ARCHITECTURE", "StandaloneIoUNet", config_file=IOU_NET).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"roi_heads.iou_branch.{x}" for x in model.roi_heads.iou_branch.state_dict()}
    before = copy.deepcopy(model.roi_heads.res5.state_dict())
    losses = model(make_batch([2, 1]))
    losses["loss_iou"].backward()
    assert set(losses) == {"loss_iou"} and not model.roi_heads.res5.training
    for name, value in model.roi_heads.res5.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_masks_are_those_of_the_refined_boxes(build, make_batch, event_storage):
    model = excite(build("MODEL.MASK_ON", "True", config_file=IOU_NET))
    losses = losses_of(model, with_masks(make_batch([2, 0])))
    assert {"loss_mask", "loss_iou"} <= set(losses)
    pooled = []
    model.roi_heads.pooler.register_forward_hook(lambda m, i, o: pooled.append(i[1]))
    (found,) = detect(model, make_batch([0]))
    boxes = pooled[-1][0]  # those without area are left out of what is found
    assert torch.equal(boxes[boxes.nonempty()].tensor, found.pred_boxes.tensor)
    assert found.pred_masks.shape == (len(found), 96, 96)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "SPP", "is 'SPP', .* res5 of .* needs one"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool", "is 'ROIPool', .* no gradient for boxes"),
        ("MODEL.ROI_BOX_HEAD.NAME", "", "is one of FastRCNNConvFCHead.*, but it is ''"),
        ("MODEL.ROI_HEADS.IN_FEATURES", "['res3', 'res4']", ".* pools from one feature"),
    ],
)
def test_wrong_settings_are_named(build, key, value, sentence):
    with pytest.raises(ValueError, match=f"{key} {sentence}"):
        build(key, value, config_file=IOU_NET)
