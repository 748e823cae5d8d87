"""Keys for rows of the papers' tables: each against its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.modeling import build_model

from assign_by_hand import iou_by_hand
from iou_d2.detectors.point_parts import build_class_loss
from iou_d2.errors import InputError
from iou_d2.ops.losses import varifocal_loss

NODE = "MODEL.POINT_DETECTOR"
LOGIT, Q = 0.3, 0.6
P = 1 / (1 + math.exp(-LOGIT))
# Key and value, the loss of a positive of quality Q and that of a negative.
CLOSED_FORMS = [
    ("varifocal", "VARIFOCAL_ALPHA", 0.5, None, 0.5 * P**2 * -math.log(1 - P)),
    ("varifocal", "VARIFOCAL_GAMMA", 3.0, None, 0.75 * P**3 * -math.log(1 - P)),
    (
        *("varifocal", "VARIFOCAL_IOU_WEIGHTED", False),
        -(Q * math.log(P) + (1 - Q) * math.log(1 - P)),
        0.75 * P**2 * -math.log(1 - P),
    ),
    (
        *("quality_focal", "QUALITY_FOCAL_BETA", 1.5),
        -(abs(Q - P) ** 1.5) * (Q * math.log(P) + (1 - Q) * math.log(1 - P)),
        P**1.5 * -math.log(1 - P),
    ),
]
FOCAL = ("MODEL.RETINANET.FOCAL_LOSS_ALPHA", "0.4", "MODEL.RETINANET.FOCAL_LOSS_GAMMA", "1.5")


def losses(cfg):
    """Of a positive and of a negative."""
    loss, logits = build_class_loss(cfg), torch.tensor([[LOGIT]], dtype=torch.float64)
    return [loss(logits, torch.full_like(logits, target)).item() for target in (Q, 0.0)]


@pytest.mark.parametrize(("kind", "name", "value", "positive", "negative"), CLOSED_FORMS)
def test_constants_of_class_losses(small_cfg, kind, name, value, positive, negative):
    overrides = (f"{NODE}.CLS_LOSS", kind, f"{NODE}.{name}", str(value))
    found = losses(small_cfg("configs/quick/vfnet_shapes.yaml", *overrides))
    plain = losses(small_cfg("configs/quick/vfnet_shapes.yaml", *overrides[:2]))
    assert found[0] == pytest.approx(plain[0] if positive is None else positive, rel=1e-6)
    assert found[1] == pytest.approx(negative, rel=1e-6)
    assert found != plain


def test_focal_loss_of_points_has_the_constants_of_retinanet(small_cfg):
    cfg = small_cfg("configs/quick/atss_shapes.yaml", f"{NODE}.CLS_LOSS", "focal", *FOCAL)
    expected = [-0.4 * (1 - P) ** 1.5 * math.log(P), -0.6 * P**1.5 * math.log(1 - P)]
    assert losses(cfg) == pytest.approx(expected, rel=1e-6)


def test_defaults_are_those_of_the_papers(small_cfg):
    loss = build_class_loss(small_cfg("configs/vfnet_R_50_FPN_1x.yaml"))
    logits, targets = torch.randn(20, 3), torch.rand(20, 3).round(decimals=1)
    assert torch.equal(loss(logits, targets), varifocal_loss(logits, targets))


@pytest.mark.parametrize("value", ["-0.5", "nan", "inf"])
@pytest.mark.parametrize("name", ["VARIFOCAL_ALPHA", "VARIFOCAL_GAMMA", "QUALITY_FOCAL_BETA"])
def test_constants_that_make_no_loss_are_named(small_cfg, name, value):
    cfg = small_cfg("configs/quick/vfnet_shapes.yaml")
    cfg.MODEL.POINT_DETECTOR[name] = float(value)
    with pytest.raises(InputError, match=f"{NODE}.{name} is at least 0"):
        build_class_loss(cfg)


TOWER = (
    "MODEL.IOU_RETINANET.IOU_TOWER",
    "True",
    "MODEL.IOU_RETINANET.IOU_TARGET_GRADIENT",
    "False",
)


def test_a_tower_of_its_own_reads_the_iou(small_cfg, make_batch, event_storage):
    torch.manual_seed(0)
    model = build_model(small_cfg("configs/quick/iou_retinanet_shapes.yaml", *TOWER)).train()
    torch.manual_seed(0)
    shared = build_model(small_cfg("configs/quick/iou_retinanet_shapes.yaml"))
    left = model.load_state_dict(shared.state_dict(), strict=False)
    own = {f"head.iou_subnet.{name}" for name in model.head.iou_subnet.state_dict()}
    assert set(left.missing_keys) == own and not left.unexpected_keys
    features = [torch.randn(1, model.head.bbox_subnet[0].in_channels, 4, 4)]
    model.head.iou_subnet.load_state_dict(model.head.bbox_subnet.state_dict())
    for a, b in zip(model.head(features), shared.head(features)):
        assert torch.equal(a[0], b[0])
    model(make_batch([3]))["loss_iou"].backward()
    assert all(x.grad is None for x in model.head.bbox_subnet.parameters())
    assert all(x.grad.abs().sum() > 0 for x in model.head.iou_subnet[:1].parameters())


def test_a_tower_of_its_own_has_no_bias_before_a_norm(small_cfg):
    overrides = ("MODEL.RETINANET.NORM", "BN", "MODEL.RETINANET.BIAS_BEFORE_NORM", "False")
    cfg = small_cfg("configs/quick/iou_retinanet_shapes.yaml", *TOWER, *overrides)
    head = build_model(cfg).head
    names = [name for name, _ in head.named_parameters() if "subnet.0" in name]
    towers = ("cls_subnet", "bbox_subnet", "iou_subnet")
    assert names == [f"{tower}.0.weight" for tower in towers]


@pytest.mark.parametrize("reaches", [True, False])
def test_the_loss_of_an_iou_branch_may_leave_the_backbone_alone(
    small_cfg, make_batch, event_storage, reaches
):
    overrides = ("MODEL.IOU_NET.FEATURE_GRADIENT", str(reaches), "MODEL.ROI_HEADS.NUM_CLASSES", "3")
    torch.manual_seed(0)
    model = build_model(small_cfg("configs/quick/iou_net_shapes.yaml", *overrides)).train()
    torch.nn.init.normal_(model.roi_heads.iou_branch.iou_pred.weight, std=0.2)
    model(make_batch([3]))["loss_iou"].backward()
    learns = [x.grad is not None and bool((x.grad != 0).any()) for x in model.backbone.parameters()]
    assert any(learns) == reaches
    assert all(x.grad.abs().sum() > 0 for x in model.roi_heads.iou_branch.iou_pred.parameters())


def test_an_iou_branch_may_learn_proposals_too(small_cfg, make_batch, event_storage):
    counts = ("MODEL.IOU_NET.PROPOSALS_PER_IMAGE", "5", "MODEL.IOU_NET.ROIS_PER_IMAGE", "4")
    cfg = small_cfg(
        "configs/quick/iou_net_shapes.yaml", *counts, "MODEL.ROI_HEADS.NUM_CLASSES", "3"
    )
    torch.manual_seed(0)
    model = build_model(cfg).train()
    branch, seen = model.roi_heads.iou_branch, []
    branch.pooler.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    outputs = []
    branch.iou_pred.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    torch.nn.init.normal_(branch.iou_pred.weight, std=0.2)
    batch = make_batch([3, 0])
    found = model(batch)["loss_iou"].item()
    rois, none = (x.tensor.tolist() for x in seen[-1])
    assert len(rois) == 9 and not none
    truth = batch[0]["instances"]
    errors = []
    for box, output in zip(rois, outputs[-1].tolist()):
        ious = [iou_by_hand(box, x) for x in truth.gt_boxes.tensor.tolist()]
        iou, number = max((iou, number) for number, iou in enumerate(ious))
        assert iou >= 0.5
        error = abs(output[truth.gt_classes[number]] - 2 * iou + 1)
        errors.append(error**2 / 2 if error < 1 else error - 0.5)
    assert found == pytest.approx(5.0 * sum(errors) / 9, rel=1e-4)


def test_proposals_of_none_are_refused(small_cfg):
    counts = ("MODEL.IOU_NET.PROPOSALS_PER_IMAGE", "5")
    with pytest.raises(InputError, match="StandaloneIoUNet trains its IoU branch on jittered"):
        build_model(small_cfg("configs/quick/iou_net_standalone_shapes.yaml", *counts))
    with pytest.raises(InputError, match="IoUNetRes5ROIHeads trains its IoU branch on jittered"):
        build_model(small_cfg("configs/iou_net_R_50_C4_1x.yaml", *counts))
