from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from iou_d2.backbones.vgg import VGG16

CONFIG = "configs/unitbox_vgg16_faces.yaml"
# Where torchvision's list of layers ends for each feature, counted by hand in its configuration D.
ENDS = {"conv1": 4, "pool2": 10, "conv3": 16, "conv4": 23, "pool4": 24, "conv5": 30, "pool5": 31}


@pytest.fixture(scope="module")
def peer():
    """torchvision's own features, without the memory of its classifier."""
    with torch.device("meta"):
        features = torchvision.models.vgg16(weights=None).features
    return features.to_empty(device="cpu").eval()


def test_features_are_those_of_torchvision(peer):
    backbone = VGG16(list(ENDS))
    peer.load_state_dict(backbone.features.state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = backbone(images)
        assert list(features) == list(ENDS)
        for name, end in ENDS.items():
            assert torch.equal(features[name], peer[:end](images.clone())), name
    for name, shape in backbone.output_shape().items():
        assert features[name].shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride)


def test_parameters_have_the_names_of_torchvision(peer):
    expected = [f"features.{name}" for name in peer.state_dict()]
    assert list(VGG16(["conv5"]).state_dict()) == expected


@pytest.mark.parametrize(
    ("names", "divisibility", "convs"),
    [(["conv1"], 1, 2), (["conv4", "conv3"], 8, 10), (["conv5"], 16, 13), (["pool5"], 32, 13)],
)
def test_only_the_stages_in_use_are_built(names, divisibility, convs):
    backbone = VGG16(names)
    assert backbone.size_divisibility == divisibility
    assert len(list(backbone.parameters())) == 2 * convs
    side = 2 * divisibility
    sum(x.square().sum() for x in backbone(torch.randn(1, 3, side, side)).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())


def test_untrained_features_neither_vanish_nor_explode():
    with torch.no_grad():
        features = VGG16(["conv1", "conv5"])(torch.randn(1, 3, 64, 64))
    assert 0.3 < features["conv5"].std() / features["conv1"].std() < 3


@pytest.mark.parametrize(("freeze_at", "frozen_convs"), [(0, 0), (2, 4), (5, 13)])
def test_frozen_stages(small_cfg, freeze_at, frozen_convs):
    cfg = small_cfg(CONFIG, "MODEL.BACKBONE.FREEZE_AT", str(freeze_at))
    backbone = build_backbone(cfg, ShapeSpec(channels=3))
    frozen = [not parameter.requires_grad for parameter in backbone.parameters()]
    assert frozen == [True] * 2 * frozen_convs + [False] * 2 * (13 - frozen_convs)


@pytest.mark.parametrize("names", [[], ["conv6"], ["conv4", "res4"]])
def test_a_wrong_feature_is_named(small_cfg, names):
    with pytest.raises(ValueError, match=r"MODEL.VGG.OUT_FEATURES takes names from conv1, pool1"):
        VGG16(names)


def test_images_of_four_channels_are_refused(small_cfg):
    with pytest.raises(ValueError, match="3 channels, not of 4"):
        build_backbone(small_cfg(CONFIG), ShapeSpec(channels=4))
