from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from iou_d2 import get_config
from iou_d2.backbones.mobilenet_v2 import MobileNetV2, StridedDepthwiseConv2d

IMAGE = ShapeSpec(channels=3)
ALL = ["res2", "res3", "res4", "res5"]
# Where torchvision's list of layers ends for each feature: the last block before the map shrinks,
# by the table of the paper (n of each row).
ENDS = {"res2": 1 + 1 + 2, "res3": 1 + 1 + 2 + 3, "res4": 1 + 1 + 2 + 3 + 4 + 3, "res5": 18}


def random_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.3, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)


@pytest.mark.parametrize(("width", "norm"), [(1.0, "FrozenBN"), (1.0, "BN"), (0.5, "FrozenBN")])
def test_features_are_those_of_torchvision(width, norm):
    torch.manual_seed(0)
    peer = torchvision.models.mobilenet_v2(weights=None, width_mult=width).eval()
    random_statistics(peer)
    backbone = MobileNetV2(ALL, width=width, norm=norm, freeze_at=2).eval()
    state = {name: x for name, x in peer.state_dict().items() if name in backbone.state_dict()}
    backbone.load_state_dict(state)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = backbone(images)
        assert list(features) == ALL
        for name, end in ENDS.items():
            torch.testing.assert_close(
                features[name], peer.features[:end](images), atol=1e-5, rtol=1e-5
            )
    for (name, shape), stride in zip(backbone.output_shape().items(), (4, 8, 16, 32)):
        assert shape.stride == stride
        assert features[name].shape == (2, shape.channels, 64 // stride, 96 // stride)


def test_weights_of_a_seed_are_those_of_torchvision():
    """No layer of ours draws random numbers of its own."""
    torch.manual_seed(0)
    peer = torchvision.models.mobilenet_v2(weights=None, num_classes=1).state_dict()
    torch.manual_seed(0)
    for name, x in MobileNetV2(ALL, norm="BN").state_dict().items():
        assert torch.equal(x, peer[name]), name


class CountClones(TorchDispatchMode):
    """Counts the copies that operators make of whole tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function == torch.ops.aten.clone.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_place", [False, True])
def test_training_copies_no_map(in_place):
    """In place, ReLU6 costs a copy of each map that it reads."""
    backbone = MobileNetV2(ALL, norm="BN").train()
    relus = [x for x in backbone.modules() if isinstance(x, nn.ReLU6)]
    for relu in relus if in_place else []:
        relu.inplace = True
    with CountClones() as clones:
        backbone(torch.randn(2, 3, 32, 32))
    assert clones.count == (len(relus) if in_place else 0)


def test_strided_depthwise_convolutions_stay_in_float32_under_autocast():
    """Against a loop over channels in float64; the others compute in bfloat16."""
    strided = [x for x in MobileNetV2(ALL).modules() if isinstance(x, StridedDepthwiseConv2d)]
    assert [conv.stride for conv in strided] == [(2, 2)] * 4
    conv = strided[0]
    x = torch.randn(1, conv.in_channels, 9, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x)
    assert y.dtype == torch.bfloat16
    x64, weight64 = (part.detach().double().requires_grad_() for part in (x, conv.weight))
    wanted = torch.cat(
        [nn.functional.conv2d(a, b[None], None, 2, 1) for a, b in zip(x64.split(1, 1), weight64)], 1
    )
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=1e-6)  # rounded once
    grad = torch.randn_like(y)
    y.backward(grad)
    wanted.backward(grad.double())
    torch.testing.assert_close(conv.weight.grad.double(), weight64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-2, atol=1e-3)


def test_channels_are_those_of_the_paper():
    channels = [shape.channels for shape in MobileNetV2(ALL).output_shape().values()]
    assert channels == [24, 32, 96, 320]


def test_parameters_have_the_names_of_torchvision():
    peer = torchvision.models.mobilenet_v2(weights=None)
    ours = set(MobileNetV2(ALL, norm="BN").state_dict())
    left = {name.split(".")[0] + "." + name.split(".")[1] for name in set(peer.state_dict()) - ours}
    assert left == {"features.18", "classifier.1"} and ours <= set(peer.state_dict())


def test_only_the_layers_in_use_are_built():
    assert len(MobileNetV2(["res3"]).features) == 7
    assert list(MobileNetV2(["res3"])(torch.zeros(1, 3, 32, 32))) == ["res3"]


# Layers up to which nothing learns, for the stem and each of the four features.
@pytest.mark.parametrize(
    ("freeze_at", "layers"), [(0, 0), (1, 2), (2, 4), (3, 7), (4, 14), (5, 18)]
)
def test_frozen_stages(freeze_at, layers):
    backbone = MobileNetV2(ALL, norm="BN", freeze_at=freeze_at).train()
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    features = backbone(torch.randn(2, 3, 64, 64))
    if freeze_at < 5:
        sum(x.square().sum() for x in features.values()).backward()
    for index, layer in enumerate(backbone.features):
        frozen = index < layers
        assert all(p.requires_grad != frozen for p in layer.parameters())
        assert any(isinstance(m, FrozenBatchNorm2d) for m in layer.modules()) == frozen
        assert frozen or all(p.grad is not None and p.grad.any() for p in layer.parameters())
    moved = {n.split(".")[1] for n, x in backbone.state_dict().items() if (x != before[n]).any()}
    assert moved == {str(index) for index in range(layers, 18)}


@pytest.mark.parametrize(
    ("config", "levels", "source"),
    [
        ("retinanet", ["p3", "p4", "p5", "p6", "p7"], "res5"),
        ("vfnet", ["p3", "p4", "p5", "p6", "p7"], "p5"),
        ("faster_rcnn", ["p2", "p3", "p4", "p5", "p6"], "p5"),
        ("unitbox", ["p3", "p4", "p5", "p6"], "p5"),
    ],
)
def test_the_pyramid_has_the_levels_of_its_detector(config, levels, source):
    backbone = build_backbone(get_config(f"quick/{config}_own_data"), IMAGE).eval()
    assert backbone.top_block.in_feature == source
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 128, 192))
    assert list(features) == list(backbone.output_shape()) == levels
    for name, shape in backbone.output_shape().items():
        assert shape.stride == 2 ** int(name[1])
        size = (-(-128 // shape.stride), -(-192 // shape.stride))
        assert features[name].shape == (1, 64, *size)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["OUT_FEATURES", "['res6']"], "OUT_FEATURES takes names from res2, .*'res6'"),
        (["OUT_FEATURES", "[]"], "OUT_FEATURES takes names from res2, .*is \\[\\]"),
        (["OUT_FEATURES", "['res3', 'res4']"], "OUT_FEATURES needs res5, .*'res4'"),
        (["OUT_FEATURES", "['res4', 'res5']"], "IN_FEATURES has res3, which is not among"),
        (["NORM", "GN"], "NORM is one of FrozenBN, BN, SyncBN, but it is 'GN'"),
        (["NORM", ""], "NORM is one of .* but it is ''"),
        (["WIDTH", "0.0"], "WIDTH must be over 0, but it is 0"),
    ],
)
def test_a_wrong_key_is_named(overrides, sentence):
    key, value = overrides
    cfg = get_config("quick/retinanet_own_data", [f"MODEL.MOBILENET_V2.{key}", value])
    with pytest.raises(ValueError, match=sentence):
        build_backbone(cfg, IMAGE)


def test_images_of_four_channels_are_refused():
    with pytest.raises(ValueError, match="3 channels, not of 4"):
        build_backbone(get_config("quick/retinanet_own_data"), ShapeSpec(channels=4))
