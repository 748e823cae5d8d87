from __future__ import annotations

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from iou_d2.detectors.point_detector import centerness_quality, iou_quality
from iou_d2.ops.box_codec import exp_distances
from iou_d2.ops.box_losses import KINDS
from point_detector_by_hand import (
    NAMES,
    cells,
    decode,
    iou_and_giou,
    losses_by_hand,
    point_detector_builder,
    predict,
)


@pytest.fixture
def build(small_cfg):
    return point_detector_builder(small_cfg)


@pytest.mark.parametrize("name", NAMES)
def test_losses_equal_loops(name, build, make_batch):
    model = build(name).train()
    batch = make_batch([3, 0, 5])
    expected = losses_by_hand(name, model, batch)
    found = {name: loss.item() for name, loss in model(batch).items()}
    assert found == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("kind", ["smooth_l1", "l2", "iou"])
@pytest.mark.parametrize("name", ["vfnet", "fcos"])
def test_losses_of_other_kinds_equal_loops(name, kind, build, make_batch):
    beta = ("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", "0.2")
    model = build(name, "MODEL.POINT_DETECTOR.BOX_LOSS", kind, *beta).train()
    batch = make_batch([3, 0, 5])
    expected = losses_by_hand(name, model, batch, kind)
    found = {name: loss.item() for name, loss in model(batch).items()}
    assert found == pytest.approx(expected, rel=2e-4)


def suppress(boxes: list, threshold: float, class_wise: bool) -> list:
    """NMS by the book of (score, class, box), best first."""
    kept = []
    for candidate in sorted(boxes, key=lambda x: -x[0]):
        rivals = [x for x in kept if x[1] == candidate[1] or not class_wise]
        if all(iou_and_giou(x[2], candidate[2])[0] <= threshold for x in rivals):
            kept.append(candidate)
    return kept


@pytest.mark.parametrize("class_wise", [True, False])
@pytest.mark.parametrize("name", ["vfnet", "vfnet_star", "atss_iou", "atss_points", "fcos"])
def test_detections_equal_loops(name, class_wise, build, make_batch):
    topk, threshold = 30, 0.35
    model = build(
        name,
        *("MODEL.RETINANET.TOPK_CANDIDATES_TEST", str(topk)),
        *("MODEL.RETINANET.SCORE_THRESH_TEST", str(threshold)),
        *("MODEL.POINT_DETECTOR.CLASS_AGNOSTIC_NMS", str(not class_wise)),
    ).eval()
    batch = make_batch([0, 0])
    predictions, points = predict(model, batch)
    with torch.no_grad():
        detected = [x["instances"] for x in model(batch)]
    for image, found in enumerate(detected):
        candidates = []
        for prediction, level in zip(predictions, points):
            in_level = []
            for _, cell, point in cells(prediction, level):
                box = [max(0, min(96, x)) for x in decode(prediction, -1, image, cell, point)]
                quality = prediction.quality_logits
                quality = 1 if quality is None else quality[(image, 0, *cell)].sigmoid().item()
                for k, p in enumerate(prediction.logits[(image, slice(None), *cell)].sigmoid()):
                    score = p.item() * quality
                    score = math.sqrt(score) if name == "atss_points" else score
                    if p > threshold:
                        order = score if name == "atss_points" else p.item()
                        in_level.append((score, k, box, order))
            candidates += sorted(in_level, key=lambda x: -x[3])[:topk]
        expected = suppress(candidates, model.nms.nms_threshold, class_wise)[:100]
        assert len(expected) < len(candidates) and len(expected) > 5
        assert found.scores.tolist() == pytest.approx([x[0] for x in expected], abs=1e-5)
        assert found.pred_classes.tolist() == [x[1] for x in expected]
        boxes = torch.tensor([x[2] for x in expected])
        torch.testing.assert_close(found.pred_boxes.tensor, boxes, atol=1e-3, rtol=0)


def test_what_detections_carry(build, make_batch):
    with torch.no_grad():
        plain = build("vfnet").eval()(make_batch([0]))[0]["instances"]
        ranked = build("atss_points").eval()(make_batch([0]))[0]["instances"]
        iou_aware = build("atss_iou").eval()(make_batch([0]))[0]["instances"]
    assert set(plain.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
    assert len(ranked) > 5
    quality = ranked.pred_centernesses
    torch.testing.assert_close(ranked.scores, (ranked.cls_scores * quality).sqrt())
    assert (ranked.cls_scores > 0.05).all()
    # A centerness is not called an IoU.
    assert not ranked.has("pred_ious") and iou_aware.has("pred_ious")


def test_qualities():
    points = torch.tensor([[5.0, 5.0], [2.0, 5.0], [0.0, 5.0], [12.0, 5.0]])
    gt_boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(4, 1)
    boxes = gt_boxes.clone().requires_grad_()
    expected = torch.tensor([1.0, math.sqrt(2 / 8), 0.0, 0.0])
    torch.testing.assert_close(centerness_quality(points, boxes, gt_boxes), expected)
    quality = iou_quality(points, boxes + torch.tensor([0.0, 0.0, 10.0, 0.0]), gt_boxes)
    torch.testing.assert_close(quality, torch.full((4,), 0.5))
    assert not quality.requires_grad


@pytest.mark.parametrize("objects", [[3, 2], [0, 4], [0, 0]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_losses_are_finite_and_reach_every_parameter(name, objects, build, make_batch):
    model = build(name).train()
    losses = model(make_batch(objects))
    sum(losses.values()).backward()
    for part, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, part
            assert torch.isfinite(parameter.grad).all(), part
    assert all((losses[x] > 0) == (sum(objects) > 0) for x in losses if x != "loss_cls")
    assert losses["loss_cls"] > 0


def test_a_positive_point_stays_one_however_bad_its_box(build, make_batch):
    model, seen = build("vfnet_vfl").train(), []
    torch.nn.init.constant_(model.head.box_pred.bias, -30.0)
    model.cls_loss = lambda logits, targets: seen.append(targets) or logits.sum()
    batch = make_batch([3])
    model(batch)
    _, points = predict(model, batch)
    matches = model.assigner(points, model.grid.strides, batch[0]["instances"].gt_boxes.tensor)
    assert (seen[0] > 0).sum() == (matches >= 0).sum() > 0
    assert seen[0].max().item() == pytest.approx(1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls_loss", ["varifocal", "quality_focal", "focal"])
def test_losses_are_parts(kind, cls_loss, build, make_batch):
    overrides = ("MODEL.POINT_DETECTOR.BOX_LOSS", kind, "MODEL.POINT_DETECTOR.CLS_LOSS", cls_loss)
    losses = build("vfnet", *overrides).train()(make_batch([3]))
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())


@pytest.mark.parametrize("name", ["vfnet", "atss"])
def test_pictures_of_the_training_change_no_loss(name, build, make_batch):
    plain, drawing, batch = build(name), build(name, "VIS_PERIOD", "2"), make_batch([3, 1])
    with EventStorage() as storage:
        losses = [model.train()(batch) for model in (plain, drawing)]
        assert losses[0] == losses[1] and len(storage._vis_data) == 1
        storage.step()
        drawing(batch)
    assert len(storage._vis_data) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("objects", [[3, 0], [0, 0]], ids=str)
@pytest.mark.parametrize("name", ["vfnet", "atss"])
def test_half_precision_is_finite(name, objects, dtype, build, make_batch):
    model, batch = build(name), make_batch(objects)
    with torch.autocast("cpu", dtype=dtype):
        losses = model.train()(batch)
        with torch.no_grad():
            found = model.eval()(batch)[0]["instances"]
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    assert all(torch.isfinite(x.grad).all() for x in model.head.parameters() if x.grad is not None)
    assert torch.isfinite(found.pred_boxes.tensor).all() and found.scores.dtype == torch.float32


@pytest.mark.parametrize("name", ["vfnet", "atss"])
def test_weights_that_are_nan_detect_nothing_and_train_with_a_nan_loss(name, build, make_batch):
    model = build(name)
    torch.nn.init.constant_(model.head.box_tower[0].weight, float("nan"))
    assert torch.isnan(model.train()(make_batch([2]))["loss_box"])
    torch.nn.init.constant_(model.head.cls_tower[0].weight, float("nan"))
    with torch.no_grad():
        assert len(model.eval()(make_batch([2]))[0]["instances"]) == 0


def test_distances_that_overflow_give_boxes_inside_the_image(build, make_batch):
    model = build("vfnet_vfl").eval()
    torch.nn.init.constant_(model.head.box_pred.bias, 1e4)
    with torch.no_grad():
        boxes = model(make_batch([0]))[0]["instances"].pred_boxes.tensor
    assert len(boxes) > 0
    assert torch.equal(boxes, torch.tensor([[0.0, 0.0, 96.0, 96.0]]).expand_as(boxes))


def test_boxes_in_the_padding_are_no_detections(build, make_batch):
    model = build("vfnet_vfl").eval()
    torch.nn.init.constant_(model.head.box_pred.bias, -3.0)
    predictions, _ = predict(model, make_batch([0], side=70))
    for prediction in predictions:
        found = model.candidates(prediction, 0, (70, 70))
        assert (found.pred_boxes.area() > 0).all() and len(found) > 0


def test_distances_beyond_half_precision():
    raw, scale = torch.tensor([12.0], dtype=torch.float16), torch.tensor(1.0)
    assert exp_distances(raw, scale, 24).item() == pytest.approx(24 * math.exp(12), rel=1e-5)


@pytest.mark.parametrize("name", ["vfnet", "fcos"])
def test_an_image_is_matched_as_if_it_were_alone(name, build):
    model = build(name)
    sizes = [(70, 41), (128, 120), (33, 128)]
    corners = torch.tensor([[2.0, 3.0], [10.0, 10.0], [20.0, 1.0]])
    truths = []
    for (height, width), corner in zip(sizes, corners):
        truth = Instances((height, width))
        truth.gt_boxes = Boxes(torch.cat([corner, corner + 25])[None])
        truths.append(truth)

    def grid(height, width):
        strides = model.grid.strides
        features = [torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in strides]
        return model.grid(features)

    def positives(points, matches):
        index = torch.nonzero(matches >= 0)[:, 0]
        return {(*torch.cat(points)[i].tolist(), matches[i].item()) for i in index}

    together = model.match(grid(128, 128), sizes, truths).view(3, -1)
    for i, (height, width) in enumerate(sizes):
        points = grid(*(-(-side // 32) * 32 for side in (height, width)))
        alone = positives(points, model.match(points, sizes[i : i + 1], truths[i : i + 1]))
        expected = {(x, y, index + i) for x, y, index in alone}
        assert positives(grid(128, 128), together[i]) == expected and expected
