from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances

from excited import excite
from iou_d2.detectors.iou_branch import IOU_CODES
from iou_d2.detectors.pooler import use_prroi_pool

IOU_NET = "configs/quick/iou_net_shapes.yaml"
STANDALONE = "configs/quick/iou_net_standalone_shapes.yaml"
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "IoUNetCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
)
ALIGN = ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2")  # Detectron2's heads know no other
OFF = ("MODEL.IOU_NET.NMS", "plain", "MODEL.IOU_NET.REFINE_STEPS", "0")


@pytest.fixture
def cfg_of(small_cfg):
    def load(*overrides, config_file=IOU_NET):
        return small_cfg(config_file, "MODEL.ROI_HEADS.NUM_CLASSES", "3", *overrides)

    return load


@pytest.fixture
def build(cfg_of):
    def load(*overrides, **kwargs):
        torch.manual_seed(0)
        return excite(build_model(cfg_of(*overrides, **kwargs)))

    return load


def detect(model, batch):
    with torch.no_grad():
        return [x["instances"] for x in model.eval()(batch)]


@pytest.mark.parametrize("kind", ["smooth_l1", "bce"])
def test_loss_equals_closed_form(kind):
    outputs, ious = [-3.0, -0.2, 0.0, 1.5], [0.9, 0.5, 0.55, 1.0]
    expected = 0.0
    for output, iou in zip(outputs, ious):
        if kind == "bce":
            p = 1 / (1 + math.exp(-output))
            expected -= iou * math.log(p) + (1 - iou) * math.log(1 - p)
        else:
            error = abs(output - 2 * (iou - 0.5))
            expected += error**2 / 2 if error < 1 else error - 0.5
    found = IOU_CODES[kind].loss(torch.tensor(outputs), torch.tensor(ious))
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("objects", [[3, 2], [0, 4], [0, 0]], ids=str)
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("MODEL.IOU_NET.LOSS_TYPE", "bce", "MODEL.ROI_HEADS.NUM_CLASSES", "1"),
        ("MODEL.IOU_NET.CLASS_AGNOSTIC", "True"),
        CASCADE,
    ],
    ids=["smooth_l1", "bce", "agnostic", "cascade"],
)
def test_losses_are_finite_and_reach_every_parameter(
    build, make_batch, event_storage, objects, overrides
):
    model = build(*overrides).train()
    classes = 1 if "1" in overrides else 3
    losses = model(make_batch(objects, classes))
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert (losses["loss_iou"] > 0) == (sum(objects) > 0)


def test_only_the_output_of_the_ground_truth_class_is_trained(build, make_batch):
    model = build().train()
    batch = make_batch([4])
    batch[0]["instances"].gt_classes[:] = 1
    branch = model.roi_heads.iou_branch
    features = model.roi_heads.levels(model.backbone(model.preprocess_image(batch).tensor))
    branch.losses(features, [x["instances"] for x in batch])["loss_iou"].backward()
    trained = branch.iou_pred.weight.grad.abs().sum(dim=1) > 0
    assert trained.tolist() == [False, True, False]


def test_loss_is_the_mean_over_jittered_boxes_of_all_images(build, make_batch):
    model = build("MODEL.IOU_NET.LOSS_WEIGHT", "2.0").train()
    batch = make_batch([2, 0, 1])
    batch[0]["instances"].gt_boxes.tensor[:] = torch.tensor([[3.0, 5, 33, 40], [50.0, 42, 90, 88]])
    branch = model.roi_heads.iou_branch
    seen = []
    branch.iou_pred.register_forward_hook(lambda module, inputs, output: seen.append(output))
    branch.pooler.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    with torch.no_grad():
        features = model.roi_heads.levels(model.backbone(model.preprocess_image(batch).tensor))
        found = branch.losses(features, [x["instances"] for x in batch])["loss_iou"].item()

    boxes, outputs = seen
    total, row = 0.0, 0
    for image, jittered in zip(batch, boxes):
        truth = image["instances"]
        for box in jittered.tensor.double().tolist():
            ious = []
            for gt in truth.gt_boxes.tensor.double().tolist():
                inner = max(0, min(box[2], gt[2]) - max(box[0], gt[0])) * max(
                    0, min(box[3], gt[3]) - max(box[1], gt[1])
                )
                area = (box[2] - box[0]) * (box[3] - box[1])
                ious.append(inner / (area + (gt[2] - gt[0]) * (gt[3] - gt[1]) - inner))
            best = int(np.argmax(ious))
            error = abs(outputs[row, truth.gt_classes[best]].item() - (2 * ious[best] - 1))
            total += error**2 / 2 if error < 1 else error - 0.5
            row += 1
    assert row == len(outputs) == 64 + 32
    assert found == pytest.approx(2 * total / row, rel=1e-4)


@pytest.mark.parametrize("overrides", [(), CASCADE], ids=["standard", "cascade"])
def test_all_off_is_faster_rcnn_with_prroi_pool_exactly(build, make_batch, overrides):
    aware = build(*overrides, *OFF)
    name = aware.roi_heads.__class__.__name__.replace("IoUNetCascade", "Cascade")
    name = name.replace("IoUNetROIHeads", "StandardROIHeads")
    plain = build(*overrides, "MODEL.ROI_HEADS.NAME", name, *ALIGN)
    use_prroi_pool(plain.roi_heads)
    plain.load_state_dict(aware.state_dict(), strict=False)
    batch = make_batch([0, 0], side=128)
    batch[1]["height"] = 200
    for a, b in zip(detect(plain, batch), detect(aware, batch)):
        assert len(a) > 20
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)
        assert b.has("pred_ious") and torch.equal(b.cls_scores, b.scores)


REFINE = ("MODEL.IOU_NET.REFINE_EARLY_STOP", "0.0", "MODEL.IOU_NET.REFINE_ROLL_BACK", "True")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_refinement_climbs_and_leaves_no_gradients(build, make_batch, mode):
    batch = make_batch([0, 0], side=128)
    model = build(*REFINE).eval()
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    with mode():
        after = [x["instances"] for x in model(batch)]
    assert all(p.grad is None for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needed
    before = detect(build(*REFINE, "MODEL.IOU_NET.REFINE_STEPS", "0"), batch)
    for a, b in zip(before, after):
        assert len(a) == len(b) > 20
        assert (b.pred_ious >= a.pred_ious - 1e-5).all()
        assert (b.pred_ious > a.pred_ious + 1e-3).float().mean() > 0.3
        assert torch.equal(a.scores, b.scores)
        assert (b.pred_boxes.tensor >= 0).all() and (b.pred_boxes.tensor <= 128).all()


def test_predicted_iou_has_the_gradient_of_finite_differences(build):
    model = build().eval().double()
    features = model.backbone(torch.rand(1, 3, 96, 96, dtype=torch.float64))
    features = [feature.detach() for feature in model.roi_heads.levels(features)]
    branch, classes = model.roi_heads.iou_branch, torch.tensor([1])
    # Detectron2's Boxes and `predict` are float32, so that the oracle is the layers in float64.
    levels = torch.tensor([0])

    def by_layers(box):
        rois = torch.cat([box.new_zeros(1, 1), box], dim=1)
        pooled = branch.pooler.level_poolers[0](features[0], rois)
        return (branch.iou_pred(branch.head(pooled))[0, 1] + 1) / 2

    box = torch.tensor([[20.3, 15.1, 51.7, 44.2]], dtype=torch.float64)
    expected = torch.stack(
        [
            (by_layers(box + d) - by_layers(box - d)) / 2e-4
            for d in torch.eye(4, dtype=torch.float64)[:, None] * 1e-4
        ]
    )
    model.float()
    features = [x.float() for x in features]
    moving = box.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        iou = branch.predict(features, [Boxes(moving)], classes, levels)
    (gradient,) = torch.autograd.grad(iou.sum(), moving)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(gradient[0].double(), expected.detach(), rtol=1e-2, atol=1e-5)


def test_iterated_regression_moves_boxes_by_the_box_head(build, make_batch):
    batch = make_batch([0], side=128)
    found = []
    for steps in (0, 2):
        model = build(
            *("MODEL.IOU_NET.NMS", "plain", "MODEL.IOU_NET.REFINE_BY", "regression"),
            *("MODEL.IOU_NET.REFINE_STEPS", str(steps)),
        )
        predictor = model.roi_heads.box_predictor
        torch.nn.init.zeros_(predictor.bbox_pred.weight)
        # A tenth of the width to the right, for the weight 10 of dx.
        predictor.bbox_pred.bias.data = torch.tensor([1.0, 0, 0, 0] * 3)
        found += detect(model, batch)
    start, end = (x.pred_boxes.tensor for x in found)
    inside = end[:, 2] < 128
    assert inside.sum() > 10 and torch.equal(found[0].scores, found[1].scores)
    moved = start[:, [0, 2]] + 0.2 * (start[:, 2:3] - start[:, 0:1])
    torch.testing.assert_close(end[inside][:, [0, 2]], moved[inside], atol=1e-3, rtol=1e-4)


def test_masks_are_those_of_the_refined_boxes(build, make_batch, event_storage):
    model = build("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16").train()
    batch = make_batch([2, 0])
    for x in batch:
        masks = torch.ones(len(x["instances"]), 96, 96, dtype=torch.bool)
        x["instances"].gt_masks = BitMasks(masks)
    losses = model(batch)
    assert {"loss_mask", "loss_iou"} <= set(losses)
    assert all(torch.isfinite(x) for x in losses.values())
    pooled = []
    model.roi_heads.mask_pooler.register_forward_hook(lambda m, i, o: pooled.extend(i[1]))
    found = detect(model, batch)
    assert found[0].pred_masks.shape == (len(found[0]), 96, 96)
    assert torch.equal(pooled[0].tensor, found[0].pred_boxes.tensor)


def test_mixed_precision_trains_and_predicts(build, make_batch, event_storage):
    model = build().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(make_batch([3, 0]))
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = detect(model, make_batch([0]))[0]
    assert len(found) > 0 and found.pred_boxes.tensor.dtype == torch.float32
    assert found.pred_ious.dtype == torch.float32 and found.pred_ious.isfinite().all()


def test_images_of_which_one_has_no_detection(build, make_batch):
    model = build("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0")
    for found in detect(model, make_batch([0, 0])):
        assert len(found) == 0 and found.pred_ious.shape == found.cls_scores.shape == (0,)
        assert isinstance(found, Instances)


def test_the_default_predictor_works(cfg_of, tmp_path):
    cfg = cfg_of()
    model = excite(build_model(cfg))
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    cfg.DATASETS.TEST = ()
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    found = DefaultPredictor(cfg)(image)["instances"]
    assert len(found) > 0 and found.image_size == (90, 120)
    assert (found.pred_ious >= 0).all() and (found.pred_ious <= 1).all()


def test_standalone_training_changes_the_iou_branch_alone(build, make_batch):
    model = build(config_file=STANDALONE).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for objects in ([3, 1], [0, 0], [2, 0]):
        losses = model(make_batch(objects))
        assert set(losses) == {"loss_iou"}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"roi_heads.iou_branch.{x}" for x in model.roi_heads.iou_branch.state_dict()}
    assert not model.backbone.training and model.training and not model.eval().training
    assert len(detect(model, make_batch([0]))[0]) > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("LOSS_TYPE", "mse"), ("NMS", "hard"), ("RANK_BY", "area"), ("REFINE_BY", "descent")),
        *(("BOX_OF", "all"), ("SOFT_NMS_BY", "iou")),
    ],
)
def test_wrong_settings_are_named(build, key, value):
    with pytest.raises(ValueError, match=f"MODEL.IOU_NET.{key} is .*'{value}'"):
        build(f"MODEL.IOU_NET.{key}", value)
