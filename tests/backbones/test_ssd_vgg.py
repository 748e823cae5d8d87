from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from iou_d2.backbones.ssd_vgg import (
    REFINEDET,
    SSD300,
    SSD512,
    SSDVGG16,
    ChannelNorm,
    _at_least,
    reduced_fc,
)
from iou_d2.errors import InputError

IMAGE = ShapeSpec(channels=3)
SSD_FEATURES = ["conv4_3", "fc7", "conv6_2", "conv7_2", "conv8_2", "conv9_2"]
REFINEDET_FEATURES = ["conv4_3", "conv5_3", "fc7", "conv6_2"]


@pytest.mark.parametrize(
    ("variant", "names", "side", "maps"),
    [
        (SSD300, SSD_FEATURES, 300, [38, 19, 10, 5, 3, 1]),
        (SSD512, [*SSD_FEATURES, "conv10_2"], 512, [64, 32, 16, 8, 4, 2, 1]),
        (REFINEDET, REFINEDET_FEATURES, 320, [40, 20, 10, 5]),
        (REFINEDET, REFINEDET_FEATURES, 512, [64, 32, 16, 8]),
    ],
)
def test_maps_are_as_large_as_published(variant, names, side, maps):
    with torch.device("meta"):
        backbone = SSDVGG16(variant, names)
        features = backbone(torch.zeros(1, 3, side, side))
    assert [x.shape[-1] for x in features.values()] == maps
    shapes = backbone.output_shape()
    assert list(features) == list(shapes) == names
    assert [x.shape[1] for x in features.values()] == [s.channels for s in shapes.values()]
    assert {x.shape[-1] for x in features.values()} == {x.shape[-2] for x in features.values()}


def test_fc6_reads_what_the_fully_connected_layer_reads():
    """With all of its neurons kept, the reduced fc6 at its centre is the layer on a 7 x 7 map whose
    other taps are 0."""
    torch.manual_seed(0)
    taps = torch.zeros(7, 7)
    taps[::3, ::3] = 1
    classifier = {
        "0.weight": (torch.randn(4096, 512, 7, 7) * taps).flatten(1),
        "0.bias": torch.randn(4096),
        "3.weight": torch.randn(4096, 4096),
        "3.bias": torch.randn(4096),
    }
    fc = reduced_fc(classifier)
    feature = torch.randn(1, 512, 7, 7)
    found = F.conv2d(feature, fc["fc6.weight"], fc["fc6.bias"], padding=3, dilation=3)[0, :, 3, 3]
    expected = F.linear(feature.flatten(1), classifier["0.weight"], classifier["0.bias"])[0]
    torch.testing.assert_close(found, expected[::4], rtol=1e-4, atol=1e-3)
    for out, inner in ((0, 0), (1, 1), (1023, 500)):
        assert fc["fc7.weight"][out, inner, 0, 0] == classifier["3.weight"][4 * out, 4 * inner]
    assert torch.equal(fc["fc7.bias"], classifier["3.bias"][::4])


def test_the_norm_is_that_of_every_position():
    x = torch.randn(2, 5, 3, 4)
    x[0, :, 1, 1] = 0
    norm = ChannelNorm(5, 20.0)
    norm.weight.data = torch.arange(1.0, 6)
    found = norm(x)
    expected = F.normalize(x) * torch.arange(1.0, 6)[:, None, None]
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[0, :, 1, 1], torch.zeros(5))
    assert torch.isfinite(norm(x.clamp(-1, 1).half() * 6e4)).all()
    assert ChannelNorm(3, 8.0).weight.tolist() == [8, 8, 8]


def test_norms_stand_where_the_variants_have_them():
    with torch.device("meta"):
        scales = {
            (variant.fc6_dilation, name): norm.weight.shape
            for variant, names in ((SSD300, SSD_FEATURES), (REFINEDET, REFINEDET_FEATURES))
            for name, norm in SSDVGG16(variant, names).norms.items()
        }
    assert scales == dict.fromkeys([(6, "conv4_3"), (3, "conv4_3"), (3, "conv5_3")], (512,))
    assert REFINEDET.norm_scales == {"conv4_3": 10, "conv5_3": 8}
    assert SSD512.norm_scales == {"conv4_3": 20}


def test_stages_after_the_last_feature_are_not_built():
    with torch.device("meta"):
        backbone = SSDVGG16(SSD512, ["conv7_2", "fc7"])
    assert list(backbone.extra) == ["conv6_2", "conv7_2"] and not backbone.norms
    assert list(backbone.output_shape()) == ["fc7", "conv7_2"]


@pytest.mark.parametrize("names", [[], ["conv10_2"], ["conv4_3", "res4"]])
def test_a_wrong_feature_is_named(names):
    with pytest.raises(InputError, match=r"SSD_VGG.OUT_FEATURES takes names from conv4_3, conv5_3"):
        SSDVGG16(SSD300, names)


@pytest.mark.parametrize(
    ("size", "maps"),
    [
        ((300, 225), [(38, 29), (19, 15), (10, 8), (5, 4), (3, 2), (1, 1)]),
        ((1, 1), [(1, 1)] * 6),
        ((64, 300), [(8, 38), (4, 19), (2, 10), (1, 5), (1, 3), (1, 1)]),
    ],
)
def test_small_images_leave_a_cell_on_every_level(size, maps):
    with torch.device("meta"):
        features = SSDVGG16(SSD300, SSD_FEATURES)(torch.zeros(1, 3, *size))
    assert [tuple(x.shape[-2:]) for x in features.values()] == maps


def test_a_map_that_is_too_small_is_read_with_zeros_behind_it():
    stage = nn.Conv2d(2, 3, 3)
    x = torch.randn(1, 2, 2, 5)
    expected = stage(torch.cat([x, torch.zeros(1, 2, 1, 5)], dim=2))
    assert torch.equal(stage(_at_least(x, stage)), expected)
    assert torch.equal(_at_least(expected, nn.Conv2d(3, 3, 3, padding=1)), expected)


def test_a_config_builds_it_and_freezes(small_cfg):
    cfg = small_cfg("configs/ssd512_VGG16_voc.yaml", "MODEL.BACKBONE.FREEZE_AT", "2")
    with torch.device("meta"):
        backbone = build_backbone(cfg, IMAGE)
    frozen = [name for name, x in backbone.named_parameters() if not x.requires_grad]
    assert len(frozen) == 8 and all(name.startswith("vgg.features.") for name in frozen)
    with pytest.raises(InputError, match="3 channels, not of 4"):
        build_backbone(cfg, ShapeSpec(channels=4))
