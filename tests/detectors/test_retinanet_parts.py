"""What is given to RetinaNet to do as torchvision and mmdetection do, and Detectron2's own weights
without any of it."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances

from iou_d2.detectors.retinanet_parts import (
    LastObjectMatcher,
    by_batch,
    by_image,
    by_running_mean,
    clipped,
    clipped_with_area,
)

PLAIN = "configs/retinanet_R_50_FPN_1x.yaml"
IOU_AWARE = "configs/iou_retinanet_R_50_FPN_1x.yaml"
STOCK = ("MODEL.META_ARCHITECTURE", "RetinaNet")


def matches_by_hand(ious):
    """mmdetection's MaxIoUAssigner, thresholds 0.4 and 0.5: (object, label) of each anchor."""
    columns = list(zip(*ious))
    found = []
    for column in columns:
        best = max(column)
        label = 1 if best >= 0.5 else 0 if best < 0.4 else -1
        found.append((column.index(best), label))
    for index, row in enumerate(ious):
        for anchor, iou in enumerate(row):
            if iou == max(row):
                found[anchor] = (index, 1)
    return found


def test_the_last_object_whose_best_anchor_it_is_keeps_it():
    ious = [[0.9, 0.1, 0.45, 0.0], [0.8, 0.2, 0.3, 0.0], [0.1, 0.3, 0.2, 0.0]]
    matches, labels = LastObjectMatcher(0.4, 0.5)(torch.tensor(ious))
    assert list(zip(matches.tolist(), labels.tolist())) == matches_by_hand(ious)
    assert matches[0] == 1 and labels.tolist() == [1, 1, -1, 0]
    # Detectron2's gives the anchor to the object that it overlaps most.
    stock, _ = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)(torch.tensor(ious))
    assert stock[0] == 0


def test_matches_of_random_ious_equal_a_loop():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        shape = torch.randint(1, 7, (2,), generator=generator).tolist()
        ious = (torch.rand(shape, generator=generator) * 10).round() / 10  # with ties
        matches, labels = LastObjectMatcher(0.4, 0.5)(ious)
        by_hand = matches_by_hand(ious.tolist())
        for match, label, (expected, expected_label) in zip(matches, labels, by_hand):
            assert label == expected_label
            assert label != 1 or match == expected


def test_no_object_and_no_anchor():
    for shape in ((0, 3), (2, 0)):
        matches, labels = LastObjectMatcher(0.4, 0.5)(torch.zeros(shape))
        assert matches.tolist() == labels.tolist() == [0] * shape[1]


def test_shares_of_a_batch():
    counts = [4, 0, 6]
    assert by_running_mean(counts, 7.5) == [(slice(None), 7.5)]
    assert by_batch(counts, 7.5) == [(slice(None), 11)]
    shares = [(slice(0, 1), 12), (slice(1, 2), 3), (slice(2, 3), 18)]
    assert by_image(counts, 7.5) == shares


def test_boxes_that_go_to_nms():
    boxes = torch.tensor([[-5.0, 1.0, 30.0, 9.0], [21.0, 0.0, 40.0, 5.0], [2.0, 2.0, 4.0, 4.0]])

    def candidates():
        return Instances((8, 20), pred_boxes=Boxes(boxes.clone()), scores=torch.arange(3))

    expected = torch.tensor([[0.0, 1.0, 20.0, 8.0], [20.0, 0.0, 20.0, 5.0], [2.0, 2.0, 4.0, 4.0]])
    assert torch.equal(clipped(candidates()).pred_boxes.tensor, expected)
    kept = clipped_with_area(candidates())
    assert torch.equal(kept.pred_boxes.tensor, expected[[0, 2]]) and kept.scores.tolist() == [0, 2]


@pytest.mark.parametrize("norm", ["", "GN"])
@pytest.mark.parametrize("config_file", [PLAIN, IOU_AWARE])
def test_detectron2s_retinanet_loads_and_detects_the_same(small_cfg, make_batch, config_file, norm):
    settings = ("MODEL.RETINANET.NORM", norm)
    torch.manual_seed(0)
    stock = build_model(small_cfg(PLAIN, *settings, *STOCK)).eval()
    torch.nn.init.constant_(stock.head.cls_score.bias, -2.5)
    torch.nn.init.normal_(stock.head.cls_score.weight, std=0.3)
    ours = build_model(small_cfg(config_file, *settings, "MODEL.IOU_RETINANET.ALPHA", "1.0")).eval()
    loaded = ours.load_state_dict(stock.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    iou_conv = ["head.iou_pred.bias", "head.iou_pred.weight"]
    assert sorted(loaded.missing_keys) == (iou_conv if config_file == IOU_AWARE else [])
    batch = make_batch([0, 0], side=128)
    with torch.no_grad():
        for a, b in zip(stock(batch), ours(batch)):
            a, b = a["instances"], b["instances"]
            assert len(a) > 20
            assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
            assert torch.equal(a.scores, b.scores)
            assert torch.equal(a.pred_classes, b.pred_classes)


@pytest.mark.parametrize("objects", [[3, 0], [0, 0]], ids=str)
@pytest.mark.parametrize("config_file", [PLAIN, IOU_AWARE])
def test_every_part_trains_images_with_and_without_objects(
    small_cfg, make_batch, event_storage, config_file, objects
):
    for normalizer in ("batch", "image"):
        cfg = small_cfg(
            config_file,
            *("MODEL.RETINANET.ASSIGNER", "mmdet", "MODEL.RETINANET.NORMALIZER", normalizer),
            *("MODEL.RETINANET.NORM", "GN", "MODEL.RETINANET.BIAS_BEFORE_NORM", "False"),
        )
        model = build_model(cfg).train()
        assert model.head.cls_subnet[0].bias is None and model.head.cls_score.bias is not None
        losses = model(make_batch(objects))
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("ASSIGNER", "atss", "is 'detectron2' or 'mmdet'"),
        ("NORMALIZER", "mean", "one of running_mean, batch, image"),
        ("BEFORE_NMS", "all", "one of as_predicted, clipped, clipped_with_area"),
    ],
)
def test_wrong_names_are_told(small_cfg, key, value, sentence):
    with pytest.raises(ValueError, match=f"MODEL.RETINANET.{key} .*{sentence}.*{value}"):
        build_model(small_cfg(PLAIN, f"MODEL.RETINANET.{key}", value))


def test_labels_that_mmdetections_assigner_does_not_have(small_cfg):
    labels = ("MODEL.RETINANET.IOU_LABELS", "[0, 1, 1]")
    with pytest.raises(ValueError, match=r"IOU_LABELS is \[0, -1, 1\] where .* \[0, 1, 1\]"):
        build_model(small_cfg(PLAIN, "MODEL.RETINANET.ASSIGNER", "mmdet", *labels))
