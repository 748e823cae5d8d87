"""Folded networks against the same modules as they come, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from networks_to_fold import NETWORKS, Operators, error, folded, images, own_data, resnet, shuffled


@pytest.fixture(scope="module", params=NETWORKS)
def network(request) -> nn.Module:
    return NETWORKS[request.param]()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_features_are_as_exact_as_unfolded(network, layout):
    x = images().contiguous(memory_format=layout)
    exact = copy.deepcopy(network).double()(x.double())
    plain, found = network(x), folded(network).to(memory_format=layout)(x)
    assert error(found, exact) < max(2 * error(plain, exact), 3e-6)
    torch.testing.assert_close(x, images(), rtol=0, atol=0)


@torch.no_grad()
def test_features_in_bfloat16_are_as_exact_as_unfolded(network):
    x = images().contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(network).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, found = network(x), folded(network)(x)
    assert {k: y.dtype for k, y in found.items()} == {k: y.dtype for k, y in plain.items()}
    assert error(found, exact) < 1.2 * error(plain, exact)


def test_gradients_are_those_of_the_unfolded_network(network):
    """In float64, where folding alone differs, of a loss that looks at every feature."""
    plain, found = copy.deepcopy(network).double(), folded(network).double()
    for each in (plain, found):
        x = images(1, torch.float64).requires_grad_()
        sum(feature.square().mean() for feature in each(x).values()).backward()
        each.image_gradient = x.grad
    gradients = [
        {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        | {"image": each.image_gradient}
        for each in (plain, found)
    ]
    assert error(gradients[1], gradients[0]) < 1e-10


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_in_float32_are_as_exact_as_unfolded(layout):
    """Where it is asked for one, oneDNN may not write the activation alone."""
    exact = resnet(18).double()
    plain, found = resnet(18), folded(resnet(18)).to(memory_format=layout)
    gradients = []
    for each in (exact, plain, found):
        x = images(1, next(each.parameters()).dtype).contiguous(memory_format=layout)
        sum(feature.square().mean() for feature in each(x).values()).backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
    wanted, unfolded, got = gradients
    assert error(got, wanted) < 2 * error(unfolded, wanted)


@pytest.mark.parametrize("learns", ["0.weight", "0.bias", "1.weight", "1.bias"])
def test_a_single_part_may_learn(learns):
    """Of a convolution and a norm whose other parts, and whose input, need no gradient."""
    plain = shuffled(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name == learns)
    found, x = (
        folded(plain),
        images()[:, [0, 1, 2, 0]].contiguous(memory_format=torch.channels_last),
    )
    gradients = []
    for network in (plain, found):
        network(x).square().sum().backward()
        gradients.append(network.get_parameter(learns).grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.ReLU(inplace=True), nn.SiLU()])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), FrozenBatchNorm2d(8), nn.Identity()])
@torch.no_grad()
def test_sequences_of_all_kinds(norm, activation):
    """With biases, groups, strides, dilation, and numbers up to about 20."""
    torch.manual_seed(0)
    for conv in (
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, 3, dilation=2, groups=4, bias=False),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 8, 3, padding="same"),
        Conv2d(4, 8, 1, norm=FrozenBatchNorm2d(8), activation=torch.sigmoid),
    ):
        plain = shuffled(nn.Sequential(conv, norm, activation, nn.Conv2d(8, 3, 1))).eval()
        x = 10 * torch.randn(2, 4, 9, 11).contiguous(memory_format=torch.channels_last)
        found = folded(plain)(x)
        torch.testing.assert_close(found, plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet-10", "ResNet-50, batch norm"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_training_with_batch_norm_is_as_exact_as_unfolded(name, layout):
    """Features, gradients and the statistics that the norms keep."""
    network = NETWORKS[name]().train()
    results = []
    for each in (
        copy.deepcopy(network).double(),
        network,
        folded(network).to(memory_format=layout),
    ):
        x = images(4, next(each.parameters()).dtype).contiguous(memory_format=layout)
        features = each(x)
        sum(feature.square().mean() for feature in features.values()).backward()
        gradients = {k: p.grad for k, p in each.named_parameters() if p.grad is not None}
        statistics = {k: buffer for k, buffer in each.named_buffers() if "running" in k}
        results.append((features, gradients, statistics))
    for exact, plain, found in zip(*results, strict=True):
        exact = {k: x.double() for k, x in exact.items()}
        assert error(found, exact) < 1.5 * error(plain, exact)


@pytest.mark.parametrize(
    ("network", "left"),
    [
        # The stem of a ResNet-50 has its ReLU before a pool, and first blocks their shortcuts. The
        # maps of three blocks are large enough for the compiled convolution.
        (
            lambda: resnet(50),
            {"aten::convolution": 5, "_convolution_pointwise": 45, "conv3x3": 3, "relu": 1},
        ),
        # Seventeen projections have no activation.
        (
            lambda: build_model(own_data()).backbone.bottom_up.eval(),
            {"aten::convolution": 17, "_convolution_pointwise": 34},
        ),
        # Each of the 23 convolutions of SSD's VGG-16 has a ReLU behind it.
        (NETWORKS["VGG-16"], {"_convolution_pointwise": 17, "conv3x3": 6}),
    ],
)
@torch.no_grad()
def test_maps_are_written_once(network, left):
    with Operators() as operators:
        x = images().contiguous(memory_format=torch.channels_last)
        folded(network()).to(memory_format=torch.channels_last)(x)
    parts = ("batch_norm", "aten::convolution", "_convolution_pointwise", "conv3x3", "relu")
    assert operators.counts(parts) == {**dict.fromkeys(parts, 0), **left}
