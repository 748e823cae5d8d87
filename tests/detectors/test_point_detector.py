from __future__ import annotations

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from iou_d2.detectors.point_detector import centerness_quality, iou_quality
from iou_d2.detectors.point_inference import INFERENCES
from iou_d2.detectors.point_parts import BoxLossMean
from iou_d2.ops.box_codec import exp_distances
from iou_d2.ops.box_losses import KINDS
from point_detector_by_hand import (
    CONFIGS,
    NAMES,
    SMALL,
    cells,
    decode,
    iou_and_giou,
    losses_by_hand,
    predict,
)


@pytest.fixture
def build(small_cfg):
    """A function: name of a config -> its model, with random heads that detect something."""

    def load(name: str, *overrides: str):
        torch.manual_seed(0)
        model = build_model(small_cfg(CONFIGS[name], *SMALL, *overrides))
        for part, parameter in model.head.named_parameters():
            if "_pred.weight" in part:
                torch.nn.init.normal_(parameter, std=0.08)
            elif "_pred.bias" in part:
                torch.nn.init.constant_(parameter, -0.5)
        return model

    return load


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


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("CLS_LOSS", "vfl", "one of varifocal, .* is 'vfl'"),
        ("BOX_LOSS", "l3", "one of .*giou.*, but it is 'l3'"),
        ("QUALITY", "giou", "'iou' or 'centerness', .* is 'giou'"),
        ("ASSIGNER", "max_iou", "'atss' or 'fcos', but it is 'max_iou'"),
        ("DISTANCE_UNITS", "[64, 128]", "has 2 entries for 5 levels"),
        ("BOX_LOSS_MEAN", "mean", "'weighted' or 'plain', but it is 'mean'"),
        ("INFERENCE", "mmdet", "one of authors, mmdetection, .*, but it is 'mmdet'"),
    ],
)
def test_wrong_settings_are_named(build, key, value, sentence):
    with pytest.raises(ValueError, match=f"MODEL.POINT_DETECTOR.{key} .*{sentence}"):
        build("vfnet", f"MODEL.POINT_DETECTOR.{key}", value)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("BOX_CODEC", "linear", "one of exp, relu, deltas, but it is 'linear'"),
        ("QUALITY_TOWER", "cls", "'box' or 'class', but it is 'cls'"),
        ("DISTANCE_UNITS", "[64, 128]", "has 2 entries for 5 levels"),
    ],
)
def test_wrong_settings_of_other_heads_are_named(build, key, value, sentence):
    with pytest.raises(ValueError, match=f"MODEL.POINT_DETECTOR.{key} .*{sentence}"):
        build("fcos", f"MODEL.POINT_DETECTOR.{key}", value)


def test_a_weight_for_each_stage_is_asked_for(build, make_batch):
    weights = ("MODEL.POINT_DETECTOR.BOX_LOSS_WEIGHTS", "[2.0]")
    with pytest.raises(ValueError, match=r"BOX_LOSS_WEIGHTS is \[2.0\], but .* of 2 stages"):
        build("vfnet", *weights)
    assert build("atss", *weights).train()(make_batch([3]))["loss_box"] > 0


def test_any_callable_is_an_assigner(build, make_batch):
    model, batch = build("vfnet").train(), make_batch([2, 1])
    model.assigner = lambda points, strides, boxes: torch.zeros(
        sum(map(len, points)), dtype=torch.int64
    )
    assert all(torch.isfinite(loss) and loss > 0 for loss in model(batch).values())


@pytest.mark.parametrize("name", ["vfnet", "atss"])
def test_all_detections_are_kept_where_their_number_is_negative(name, build, make_batch):
    keys = "MODEL.RETINANET.NMS_THRESH_TEST", "1.0", "TEST.DETECTIONS_PER_IMAGE"
    with torch.no_grad():
        found = [
            build(name, *keys, count).eval()(make_batch([0]))[0]["instances"]
            for count in ("-1", "7")
        ]
    every, best = found
    assert len(every) > 100 and len(best) == 7
    torch.testing.assert_close(every.scores[:7], best.scores)


def test_towers_without_a_convolution_read_the_features(small_cfg, make_batch):
    model = build_model(small_cfg(CONFIGS["atss"], *SMALL, "MODEL.RETINANET.NUM_CONVS", "0"))
    assert len(model.head.cls_tower) == len(model.head.box_tower) == 0
    assert all(torch.isfinite(loss) for loss in model.train()(make_batch([3])).values())


def test_the_assigner_of_a_config(build):
    atss, fcos = build("atss"), build("fcos")
    assert (atss.grid.offset, fcos.grid.offset) == (0.0, 0.5)
    atss, fcos = atss.assigner, fcos.assigner
    assert (atss.topk, atss.anchor_scale) == (9, 3.0)
    assert fcos.ranges == ((-1, 16), (16, 32), (32, 64), (64, 128), (128, 1e8))
    assert fcos.center_sampling_radius is None
    overrides = (
        "MODEL.POINT_DETECTOR.POINT_OFFSET",
        "0.25",
        "MODEL.POINT_DETECTOR.CENTER_SAMPLING_RADIUS",
        "1.5",
    )
    fcos = build("fcos", *overrides)
    assert (fcos.assigner.center_sampling_radius, fcos.grid.offset) == (1.5, 0.25)


def test_ranges_without_their_limits(build):
    ranges = build("fcos", "MODEL.POINT_DETECTOR.OPEN_RANGES", "True").assigner.ranges
    (low, high), (next_low, _) = ranges[:2]
    assert low < 0 and ranges[-1][1] > 9e7
    assert high < 16 < next_low
    between = torch.tensor([high, 16.0, next_low], dtype=torch.float32)
    assert torch.equal(torch.nextafter(between[:2], between[1:]), between[1:])


@pytest.mark.parametrize("codec", ["exp", "relu", "deltas"])
def test_the_codec_says_what_a_checkpoint_holds(codec, build, make_batch):
    model = build("fcos", "MODEL.POINT_DETECTOR.BOX_CODEC", codec).train()
    names = {name for name, _ in model.head.named_parameters() if "scales" in name}
    scales = "delta_scales" if codec == "deltas" else "box_scales"
    assert names == {f"{scales}.{level}" for level in range(5)}
    losses = model(make_batch([3, 0]))
    sum(losses.values()).backward()
    assert all(x.grad is not None for x in model.head.parameters())


def test_a_head_without_scales(build, make_batch):
    model = build("fcos", "MODEL.POINT_DETECTOR.LEVEL_SCALES", "False").train()
    assert not any("scales" in name for name in model.state_dict())
    assert all(torch.isfinite(x) for x in model(make_batch([3])).values())


def test_a_plain_mean_of_box_losses():
    losses, quality = torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.3])
    assert BoxLossMean(False)(losses, quality).item() == 2
    assert BoxLossMean(True, 1e-6)(losses, quality).item() == pytest.approx(2.5)
    assert BoxLossMean(True, 1.0)(losses, quality).item() == pytest.approx(1.0)
    nothing = torch.zeros(0, requires_grad=True)
    for mean in (BoxLossMean(False), BoxLossMean(True, 1e-6)):
        mean(nothing, torch.zeros(0)).backward()
        assert mean(nothing, torch.zeros(0)).item() == 0


@pytest.mark.parametrize("name", INFERENCES)
def test_inferences_differ_in_what_they_say(name):
    inference = INFERENCES[name]
    p, q = torch.tensor([[0.5, 0.2], [0.3, 0.9]]), torch.tensor([[0.9], [0.1]])
    order = inference.order(p, q, 0.25)
    score = (p * q).sqrt() if name != "mmdetection" else p * q
    torch.testing.assert_close(inference.score(p, q), score)
    above = {
        "torchvision": [[True, True], [False, True]],
        "detectron2": [[True, True], [False, True]],
    }.get(name, [[True, False], [True, True]])
    assert (order > 0).tolist() == above
    best = order.flatten().argmax().item()
    assert best == (3 if name == "mmdetection" else 0)
