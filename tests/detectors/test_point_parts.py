"""The parts of point detectors that a config chooses."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from iou_d2.detectors.point_inference import INFERENCES
from iou_d2.detectors.point_parts import BoxLossMean
from point_detector_by_hand import CONFIGS, SMALL, point_detector_builder


@pytest.fixture
def build(small_cfg):
    return point_detector_builder(small_cfg)


@pytest.mark.parametrize(
    ("name", "key", "value", "sentence"),
    [
        ("vfnet", "CLS_LOSS", "vfl", "one of varifocal, .* is 'vfl'"),
        ("vfnet", "BOX_LOSS", "l3", "one of .*giou.*, but it is 'l3'"),
        ("vfnet", "QUALITY", "giou", "'iou' or 'centerness', .* is 'giou'"),
        ("vfnet", "ASSIGNER", "max_iou", "'atss' or 'fcos', but it is 'max_iou'"),
        ("vfnet", "DISTANCE_UNITS", "[64, 128]", "has 2 entries for 5 levels"),
        ("vfnet", "BOX_LOSS_MEAN", "mean", "'weighted' or 'plain', but it is 'mean'"),
        ("vfnet", "INFERENCE", "mmdet", "one of authors, mmdetection, .*, but it is 'mmdet'"),
        ("fcos", "BOX_CODEC", "linear", "one of exp, relu, deltas, but it is 'linear'"),
        ("fcos", "QUALITY_TOWER", "cls", "'box' or 'class', but it is 'cls'"),
        ("fcos", "DISTANCE_UNITS", "[64, 128]", "has 2 entries for 5 levels"),
        ("fcos", "MAX_DISTANCES", "[20, 40, 80]", "has 3 entries for 5 levels"),
    ],
)
def test_wrong_settings_are_named(build, name, key, value, sentence):
    with pytest.raises(ValueError, match=f"MODEL.POINT_DETECTOR.{key} .*{sentence}"):
        build(name, f"MODEL.POINT_DETECTOR.{key}", value)


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
