"""Poolers that put out maxima and spatial pyramids, and the box heads behind them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import nn
from torchvision.ops import RoIPool

from iou_d2.detectors.any_pooler import PYRAMIDS
from iou_d2.detectors.pooler import PrRoIPooler, SPPPooler, use_prroi_pool
from learning import assert_learns_two_boxes

FASTER_RCNN = "configs/quick/faster_rcnn_shapes.yaml"
IOU_NET = "configs/quick/iou_net_shapes.yaml"
KIND = "MODEL.ROI_BOX_HEAD.POOLER_TYPE"
LEVELS = "MODEL.ROI_BOX_HEAD.SPP_LEVELS"
SCALES = [1 / 4, 1 / 8, 1 / 16]
SETTINGS = {"canonical_box_size": 32, "canonical_level": 3}


@pytest.fixture
def build(small_cfg):
    def make(*overrides, config_file=FASTER_RCNN):
        torch.manual_seed(0)
        sizes = ("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_HEADS.NUM_CLASSES", "3")
        return build_model(small_cfg(config_file, *sizes, *overrides))

    return make


def make_pyramid(images=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, 5, s, s + 4, generator=generator) for s in (32, 16, 8)]


def make_boxes(counts):
    generator = torch.Generator().manual_seed(0)
    boxes = []
    for count in counts:
        start = torch.rand(count, 2, generator=generator) * 40
        side = 4 + torch.rand(count, 2, generator=generator) ** 2 * 76
        boxes.append(Boxes(torch.cat([start, start + side], 1)))
    return boxes


@pytest.mark.parametrize("levels", [(4, 2, 1), (6, 3, 2, 1)])
def test_every_box_is_pooled_from_its_own_level(levels):
    pyramid, boxes = make_pyramid(), make_boxes([40, 25])
    pooler = SPPPooler(PYRAMIDS["SPP"], levels, SCALES, **SETTINGS)
    found = pooler(pyramid, boxes)
    bins = sum(x * x for x in levels)
    assert found.shape == (65, 5, bins, 1) and pooler.output_size == (bins, 1)
    seen = set()
    for index, box in enumerate(torch.cat([x.tensor for x in boxes]).tolist()):
        size = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        level = min(max(math.floor(3 + math.log2(size / 32)), 2), 4) - 2
        seen.add(level)
        x1, y1, x2, y2 = (math.floor(x * SCALES[level] + 0.5) for x in box)
        window = pyramid[level][int(index >= 40), :, y1 : y2 + 1, x1 : x2 + 1]
        expected = [F.adaptive_max_pool2d(window, side).flatten(1) for side in levels]
        assert torch.equal(found[index, :, :, 0], torch.cat(expected, dim=1))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("counts", [[0, 0], [0, 3]])
@pytest.mark.parametrize("kind", PYRAMIDS)
def test_images_without_boxes(kind, counts):
    pyramid = [x.requires_grad_() for x in make_pyramid()]
    found = SPPPooler(PYRAMIDS[kind], (4, 2, 1), SCALES)(pyramid, make_boxes(counts))
    assert found.shape == (sum(counts), 5, 21, 1)
    found.sum().backward()
    assert all(x.grad is not None for x in pyramid)


def test_no_images():
    pyramid = [x[:0] for x in make_pyramid()]
    assert SPPPooler(PYRAMIDS["SPP"], (2, 1), SCALES)(pyramid, []).shape == (0, 5, 5, 1)


@pytest.mark.parametrize("kind", [*PYRAMIDS, None])
def test_a_box_that_is_not_finite_gives_0_and_keeps_its_place(kind):
    layer = PYRAMIDS.get(kind)
    pooler = SPPPooler(layer, (2, 1), SCALES, **SETTINGS) if kind else PrRoIPooler(2, SCALES)
    pyramid, boxes = make_pyramid(images=1), make_boxes([6])
    expected = pooler(pyramid, boxes)
    boxes[0].tensor[2, 1], boxes[0].tensor[4, 2] = math.nan, math.inf
    found = pooler(pyramid, boxes)
    assert (found[[2, 4]] == 0).all()
    torch.testing.assert_close(found[[0, 1, 3, 5]], expected[[0, 1, 3, 5]])


def test_one_level_of_seven_bins_is_roi_pooling(build):
    pooler = build(KIND, "SPP", LEVELS, "[7]").roi_heads.box_pooler
    theirs = ROIPooler(7, [x / 4 for x in (1, 1 / 2, 1 / 4, 1 / 8)], 0, "ROIPool")
    assert {type(x) for x in theirs.level_poolers} == {RoIPool}
    features = [torch.randn(1, 64, side, side) for side in (32, 16, 8, 4)]
    boxes = make_boxes([30])
    assert torch.equal(pooler(features, boxes).view(30, 64, 7, 7), theirs(features, boxes))


@pytest.mark.parametrize("levels", ["[4, 2, 1]", "[6, 3, 2, 1]"])
@pytest.mark.parametrize("kind", PYRAMIDS)
@pytest.mark.parametrize("roi_heads", ["BoxLossROIHeads", "BoxLossCascadeROIHeads"])
def test_the_box_heads_take_the_bins(build, make_batch, event_storage, roi_heads, kind, levels):
    cascade = str(roi_heads != "BoxLossROIHeads")
    model = build(
        *(KIND, kind, LEVELS, levels, "MODEL.ROI_HEADS.NAME", roi_heads),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", cascade),
    )
    heads = model.roi_heads.box_head
    for head in heads if cascade == "True" else [heads]:
        assert head.fc1.in_features == 32 * {"[4, 2, 1]": 21, "[6, 3, 2, 1]": 50}[levels]
    losses = model.train()(make_batch([2, 0]))
    sum(losses.values()).backward()
    assert all(x.isfinite() for x in losses.values())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        model.eval()(make_batch([0, 0]))


def test_iou_net_climbs_on_means_and_refuses_maxima(build, make_batch, event_storage):
    with pytest.raises(ValueError, match="POOLER_TYPE is 'SPP', .* no gradient for boxes"):
        build(KIND, "SPP", config_file=IOU_NET)
    resting = build(KIND, "SPP", "MODEL.IOU_NET.REFINE_STEPS", "0", config_file=IOU_NET)
    climbing = build(KIND, "PrRoISPP", config_file=IOU_NET)
    for model in (resting, climbing):
        losses = model.train()(make_batch([2, 0]))
        assert losses["loss_iou"] > 0 and losses["loss_iou"].isfinite()
        with torch.no_grad():
            assert model.eval()(make_batch([0]))[0]["instances"].has("pred_ious")
    branch = climbing.roi_heads.iou_branch
    boxes = torch.tensor([[10.3, 12.1, 50.2, 40.9]], requires_grad=True)
    features = [torch.randn(1, 64, side, side) for side in (24, 12, 6, 3)]
    features = [torch.randn(1, 32, *x.shape[2:]) for x in features]
    branch.predict(features, [Boxes(boxes)], torch.tensor([0])).sum().backward()
    assert (boxes.grad != 0).all()


@pytest.mark.parametrize("levels", ["[]", "[2, 0]", "[2.0]", "['4']"])
def test_wrong_levels_are_named(build, levels):
    with pytest.raises(ValueError, match="SPP_LEVELS is bins a side .*, but it is"):
        build(KIND, "SPP", LEVELS, levels)


@pytest.mark.parametrize(
    "layers", [("NUM_CONV", "1", "NUM_FC", "1"), ("NUM_CONV", "0", "NUM_FC", "0")]
)
def test_heads_that_cannot_read_bins_are_refused(build, layers):
    keys = (f"MODEL.ROI_BOX_HEAD.{layers[0]}", layers[1], f"MODEL.ROI_BOX_HEAD.{layers[2]}")
    with pytest.raises(ValueError, match="'SPP' puts out bins of several sizes"):
        build(KIND, "SPP", *keys, layers[3])


def test_masks_are_not_made_of_bins(build):
    mask = ("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.POOLER_TYPE")
    with pytest.raises(ValueError, match="MODEL.ROI_MASK_HEAD.POOLER_TYPE is 'SPP'"):
        build(*mask, "SPP")
    assert build(KIND, "SPP", *mask, "PrRoIPool").roi_heads.mask_pooler.output_size == (14, 14)


def test_an_empty_name_of_the_box_head_is_told(build):
    with pytest.raises(ValueError, match="MODEL.ROI_BOX_HEAD.NAME is one of .*, but it is ''"):
        build("MODEL.ROI_BOX_HEAD.NAME", "")


def test_precise_pooling_does_not_take_the_place_of_bins(build):
    with pytest.raises(ValueError, match="An SPPPooler has no output size"):
        use_prroi_pool(build(KIND, "SPP"))
    for kind in ("PrRoISPP", "PrRoIPoolLegacy"):
        model = build(KIND, kind)
        before = model.roi_heads.box_pooler
        assert use_prroi_pool(model).roi_heads.box_pooler is before


def squares_in_boxes(count: int, generator: torch.Generator):
    """Images of a bright square, a box of 16 pixels around each, and where in it the square is."""
    place = torch.randint(0, 12, (count, 2), generator=generator)  # x, y in the box
    start = torch.randint(0, 9, (count, 2), generator=generator)
    images = torch.rand(count, 1, 24, 24, generator=generator) * 0.1
    for image, (x, y) in zip(images, (start + place).tolist()):
        image[0, y : y + 5, x : x + 5] = 1
    boxes = [Boxes(torch.cat([x, x + 15])[None].float()) for x in start]
    return images, boxes, place / 12.0


@pytest.mark.parametrize(
    ("levels", "learns"), [((4, 2, 1), True), ((6, 3, 2, 1), True), ((1,), False)]
)
def test_what_reads_the_bins_learns_where_an_object_is(levels, learns):
    """And does not from the maximum of the whole box, which is the same wherever it is."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    pooler = SPPPooler(PYRAMIDS["SPP"], levels, [1.0])
    conv, fc = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * pooler.output_size[0], 32)
    head = nn.Sequential(nn.Flatten(), fc, nn.ReLU(), nn.Linear(32, 2))

    def error():
        images, boxes, place = squares_in_boxes(64, generator)
        return (head(pooler([conv(images).relu()], boxes)) - place).abs().mean()

    optimizer = torch.optim.Adam([*conv.parameters(), *head.parameters()], lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert (error() < 0.1) == learns


def test_a_detector_learns_two_boxes_from_scratch(small_cfg, make_batch, event_storage):
    """It takes as long with ROIAlign: the second stage learns by what the first one proposes."""
    torch.manual_seed(0)
    keys = ("MODEL.ROI_BOX_HEAD.FC_DIM", "64", "MODEL.ROI_HEADS.NUM_CLASSES", "2")
    model = build_model(small_cfg(FASTER_RCNN, *keys, KIND, "SPP", LEVELS, "[4, 2, 1]"))
    assert_learns_two_boxes(model, *make_batch([2], classes=2, side=128), steps=100, tolerance=8)
