from __future__ import annotations

import math
import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from iou_d2.detectors.iou_awareness import IOU_LOSSES, confidence
from iou_d2.detectors.retinanet import AnchorPrediction
from iou_d2.ops.box_losses import KINDS

IOU_AWARE = "configs/iou_retinanet_R_50_FPN_1x.yaml"
PLAIN = "configs/retinanet_R_50_FPN_1x.yaml"
STOCK = ("MODEL.META_ARCHITECTURE", "RetinaNet")


def loss_by_hand(logits, targets, kind):
    total = 0.0
    for logit, target in zip(logits, targets):
        p = 1 / (1 + math.exp(-logit))
        if kind == "bce":
            total -= target * math.log(p) + (1 - target) * math.log(1 - p)
        else:
            total += abs(p - target) if kind == "l1" else (p - target) ** 2
    return total


def iou_by_hand(delta, anchor, target):
    """IoU of the decoded box with its target, in Python floats."""
    dx, dy, dw, dh = delta
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    cx, cy = anchor[0] + w / 2 + dx * w, anchor[1] + h / 2 + dy * h
    w, h = w * math.exp(dw), h * math.exp(dh)
    inner = max(0, min(cx + w / 2, target[2]) - max(cx - w / 2, target[0])) * max(
        0, min(cy + h / 2, target[3]) - max(cy - h / 2, target[1])
    )
    return inner / (w * h + (target[2] - target[0]) * (target[3] - target[1]) - inner)


@pytest.mark.parametrize("kind", ["bce", "l1", "l2"])
def test_iou_prediction_loss_equals_closed_form(kind):
    logits, targets = [-3.0, -0.2, 0.0, 1.5], [0.9, 0.1, 0.5, 1.0]
    loss = IOU_LOSSES[kind](torch.tensor(logits), torch.tensor(targets))
    assert loss.item() == pytest.approx(loss_by_hand(logits, targets, kind), rel=1e-6)


def test_bce_gradient_of_the_target_is_equation_5():
    logits = torch.tensor([-2.0, 0.3, 4.0], dtype=torch.float64)
    target = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    IOU_LOSSES["bce"](logits, target).backward()
    p = 1 / (1 + torch.exp(-logits))
    torch.testing.assert_close(target.grad, torch.log((1 - p) / p))


def test_confidence():
    p, iou = torch.tensor([0.25, 0.9, 0.0]), torch.tensor([0.81, 0.0, 0.0])
    torch.testing.assert_close(confidence(p, iou, 0.5), torch.tensor([0.45, 0.0, 0.0]))
    assert torch.equal(confidence(p, iou, 1.0), p)
    assert torch.equal(confidence(p, iou, 0.0), iou)


@pytest.fixture
def pair(small_cfg):
    """Plain RetinaNet, and IoU-aware RetinaNet with its weights and some made-up IoU conv."""

    def build(alpha: float):
        torch.manual_seed(0)
        plain = build_model(small_cfg(PLAIN, *STOCK)).eval()
        # Raise the scores, so that random weights detect something.
        torch.nn.init.constant_(plain.head.cls_score.bias, -2.5)
        torch.nn.init.normal_(plain.head.cls_score.weight, std=0.3)
        aware = build_model(small_cfg(IOU_AWARE, "MODEL.IOU_RETINANET.ALPHA", str(alpha))).eval()
        aware.load_state_dict(plain.state_dict(), strict=False)
        torch.nn.init.normal_(aware.head.iou_pred.weight, std=0.5)
        return plain, aware

    return build


def test_alpha_1_is_plain_retinanet_exactly(pair, make_batch):
    plain, aware = pair(1.0)
    batch = make_batch([0, 0], side=128)
    batch[1]["height"] = 200
    with torch.no_grad():
        expected, found = plain(batch), aware(batch)
    for a, b in zip(expected, found):
        a, b = a["instances"], b["instances"]
        assert len(a) > 20
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_classes, b.pred_classes)


def test_scores_are_the_mix_of_class_score_and_predicted_iou(pair, make_batch):
    _, aware = pair(0.3)
    with torch.no_grad():
        found = aware(make_batch([0]))[0]["instances"]
    assert len(found) > 20
    torch.testing.assert_close(found.scores, found.cls_scores**0.3 * found.pred_ious**0.7)
    assert (found.scores > 0.05).all()
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)


@pytest.mark.parametrize("objects", [[3, 2], [0, 4], [0, 0]], ids=str)
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("loss_type", ["bce", "l1", "l2"])
def test_losses_are_finite_and_reach_every_parameter(
    small_cfg, make_batch, event_storage, objects, classes, loss_type
):
    cfg = small_cfg(
        IOU_AWARE,
        *("MODEL.RETINANET.NUM_CLASSES", str(classes)),
        *("MODEL.IOU_RETINANET.IOU_LOSS_TYPE", loss_type),
    )
    model = build_model(cfg).train()
    losses = model(make_batch(objects, classes))
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_iou"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    assert (losses["loss_iou"] > 0) == (sum(objects) > 0)


@pytest.mark.parametrize("flows", [True, False])
def test_target_gradient_reaches_the_box_conv_where_the_key_says_so(
    small_cfg, make_batch, event_storage, flows
):
    cfg = small_cfg(IOU_AWARE, "MODEL.IOU_RETINANET.IOU_TARGET_GRADIENT", str(flows))
    model = build_model(cfg).train()
    torch.nn.init.constant_(model.head.iou_pred.bias, 1.0)
    model(make_batch([4]))["loss_iou"].backward()
    gradient = model.head.bbox_pred.weight.grad
    assert (gradient is not None and gradient.abs().sum() > 0) == flows
    assert model.head.iou_pred.weight.grad.abs().sum() > 0


def test_iou_loss_equals_a_loop_over_positive_anchors(small_cfg, make_batch, event_storage):
    torch.manual_seed(0)
    model = build_model(small_cfg(IOU_AWARE)).train()
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.1)
    batch = make_batch([3, 0, 5])
    with torch.no_grad():
        predictions = model.predict(model.preprocess_image(batch).tensor)
        anchors = Boxes.cat([level.anchors for level in predictions])
        labels, gt_boxes = model.label_anchors(anchors, [x["instances"] for x in batch])
        found = model(batch)["loss_iou"].item()

    total, positives = 0.0, 0
    for image in range(3):
        offset = 0
        for level in predictions:
            for index, anchor in enumerate(level.anchors.tensor):
                if 0 <= labels[image][offset + index] < model.num_classes:
                    iou = iou_by_hand(
                        level.deltas[image, index].double().tolist(),
                        anchor.double().tolist(),
                        gt_boxes[image][offset + index].double().tolist(),
                    )
                    total += loss_by_hand([level.iou_logits[image, index].item()], [iou], "bce")
                    positives += 1
            offset += len(level.anchors)
    assert positives > 10
    assert found == pytest.approx(total / positives, rel=1e-4)


@pytest.mark.parametrize("objects", [[3, 2], [0, 4], [0, 0]], ids=str)
@pytest.mark.parametrize("kind", ["smooth_l1", "giou"])
def test_losses_and_gradients_equal_detectron2s(
    small_cfg, make_batch, event_storage, kind, objects
):
    settings = "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", kind
    settings = *settings, "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", "0.2"
    models = []
    for overrides in ((), STOCK):
        torch.manual_seed(0)
        models.append(build_model(small_cfg(PLAIN, *settings, *overrides)).train())
    ours, stock = models
    assert type(ours) is not type(stock)
    for _ in range(2):  # the normaliser is a running mean
        found, expected = (model(make_batch(objects)) for model in models)
        assert set(found) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)
    found["loss_box_reg"].backward()
    expected["loss_box_reg"].backward()
    for a, b in zip(ours.head.parameters(), stock.head.parameters()):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("objects", [[3, 0], [0, 0]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config_file", [PLAIN, IOU_AWARE])
def test_every_box_loss_trains_a_step(
    small_cfg, make_batch, event_storage, config_file, kind, objects
):
    model = build_model(small_cfg(config_file, "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", kind)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model.head.bbox_pred.weight.clone()
    for _ in range(2):
        losses = model(make_batch(objects))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert (losses["loss_box_reg"] > 0) == (sum(objects) > 0)
    assert torch.equal(before, model.head.bbox_pred.weight) == (sum(objects) == 0)


def test_box_loss_equals_a_loop_over_positive_anchors(small_cfg, event_storage):
    torch.manual_seed(0)
    settings = "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "iou"
    settings = *settings, "MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT", "2.0"
    model = build_model(small_cfg(PLAIN, *settings))
    corner = torch.rand(17, 2) * 80
    anchors = torch.cat([corner, corner + 10 + torch.rand(17, 2) * 30], dim=1)
    levels = [12, 5]  # anchors of two levels, for two images
    deltas = torch.randn(2, 17, 4) * 0.3
    labels = torch.randint(-1, 4, (2, 17))  # 3 is the background
    targets = anchors + torch.randn(2, 17, 4)
    total, positives = 0.0, 0
    for image in range(2):
        for i in range(17):
            if labels[image, i] in (0, 1, 2):
                arguments = deltas[image, i], anchors[i], targets[image, i]
                total += 1 - iou_by_hand(*(x.double().tolist() for x in arguments))
                positives += 1
    model.label_anchors = lambda anchors, truth: (labels, targets)
    parts = zip(anchors.split(levels), deltas.split(levels, dim=1))
    predictions = [
        AnchorPrediction(Boxes(of_level), torch.randn(2, len(of_level), 3), delta)
        for of_level, delta in parts
    ]
    losses = model.losses(predictions, [(128, 128)] * 2, [None] * 2)
    normalizer = 0.9 * 100 + 0.1 * positives
    assert positives > 5
    assert losses["loss_box_reg"].item() == pytest.approx(2 * total / normalizer, rel=1e-5)


def test_an_unknown_box_loss_is_named(small_cfg):
    key = "MODEL.RETINANET.BBOX_REG_LOSS_TYPE"
    for config_file in (PLAIN, IOU_AWARE):
        with pytest.raises(ValueError, match=f"{key} is one of smooth_l1, l2, iou, .* is 'huber'"):
            build_model(small_cfg(config_file, key, "huber"))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [("ALPHA", "1.5", "lies in"), ("IOU_LOSS_TYPE", "huber", "one of bce, l1, l2")],
)
def test_wrong_settings_are_named(small_cfg, key, value, sentence):
    with pytest.raises(ValueError, match=f"MODEL.IOU_RETINANET.{key}.*{sentence}"):
        build_model(small_cfg(IOU_AWARE, f"MODEL.IOU_RETINANET.{key}", value))


def test_pictures_of_the_training_change_no_loss(small_cfg, make_batch):
    batch, losses = make_batch([3, 1]), []
    with EventStorage() as storage:
        for period in ("0", "2"):
            torch.manual_seed(0)
            model = build_model(small_cfg(IOU_AWARE, "VIS_PERIOD", period)).train()
            losses.append(model(batch))
        assert losses[0] == losses[1] and len(storage._vis_data) == 1
        storage.step()
        model(batch)
    assert len(storage._vis_data) == 1


def test_labels_of_anchors_are_those_of_detectron2(small_cfg, make_batch):
    ours, stock = build_model(small_cfg(PLAIN)), build_model(small_cfg(PLAIN, *STOCK))
    with torch.no_grad():
        batch = make_batch([4, 0, 2], side=128)
        truth = [x["instances"] for x in batch]
        predictions = ours.predict(ours.preprocess_image(batch).tensor)
        anchors = [level.anchors for level in predictions]
        labels, gt_boxes = ours.label_anchors(Boxes.cat(anchors), truth)
        expected_labels, expected_boxes = stock.label_anchors(anchors, truth)
    assert torch.equal(labels, torch.stack(expected_labels)) and (labels < 3).sum() > 5
    assert torch.equal(gt_boxes, torch.stack(expected_boxes))


def test_zoo_weights_load_and_only_the_iou_conv_is_new(small_cfg, tmp_path):
    plain = build_model(small_cfg(PLAIN, *STOCK))
    aware = build_model(small_cfg(IOU_AWARE))
    weights = {name: value.numpy() for name, value in plain.state_dict().items()}
    path = tmp_path / "model_final.pkl"
    # The format of Detectron2's model zoo.
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "Detectron2 Model Zoo"}))
    checkpointer = DetectionCheckpointer(aware)
    loaded = checkpointer._load_model(checkpointer._load_file(str(path)))
    assert sorted(loaded.missing_keys) == ["head.iou_pred.bias", "head.iou_pred.weight"]
    assert loaded.unexpected_keys == []
    assert torch.equal(aware.head.bbox_pred.weight, plain.head.bbox_pred.weight)
