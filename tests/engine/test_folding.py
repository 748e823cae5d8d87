"""Batch norm as a part of the convolution before it, against numpy and against the two apart."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation

from iou_d2 import get_config
from iou_d2.engine.build import build_detector
from iou_d2.engine.compilation import compile_networks
from iou_d2.engine.folding import FoldingConv2d, FoldingSequential, fold_norms

CONFIGS = (
    "vfnet_R_50_FPN_1x",
    "quick/vfnet_own_data",
    "quick/iou_net_own_data",
    "quick/ssd_shapes",
)


def with_numbers(norm: nn.Module) -> nn.Module:
    """`norm` with statistics, weights and biases that are no identity."""
    for tensor, low in ((norm.running_mean, -1), (norm.running_var, 0.2)):
        tensor.uniform_(low, 2)
    if norm.weight is not None:
        with torch.no_grad():
            norm.weight.uniform_(-2, 2)
            norm.bias.uniform_(-2, 2)
    return norm


def pair(kind: str, norm: nn.Module, bias: bool = False) -> nn.Module:
    """A convolution of stride 2 with `norm` and ReLU, in one of the three forms that are found."""
    sizes = {"kernel_size": 3, "stride": 2, "padding": 1}
    if kind == "Conv2d":
        return Conv2d(3, 4, **sizes, bias=bias, norm=norm, activation=nn.ReLU())
    if kind == "Sequential":
        return nn.Sequential(nn.Conv2d(3, 4, **sizes, bias=bias), norm, nn.ReLU())
    return Conv2dNormActivation(3, 4, **sizes, bias=bias, norm_layer=lambda channels: norm)


def calls_of(norm: nn.Module) -> list:
    """Filled with each call of `norm`."""
    calls = []
    norm.register_forward_hook(lambda *call: calls.append(call))
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_output_and_gradients_are_those_of_the_formula(affine, bias):
    torch.manual_seed(0)
    norm = with_numbers(nn.BatchNorm2d(4, affine=affine, eps=0.1))
    layer = fold_norms(nn.Sequential(nn.Conv2d(3, 4, 1, bias=bias), norm)).double().eval()
    calls = calls_of(norm)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert not calls
    numbers = {name: value.detach().numpy() for name, value in layer.state_dict().items()}
    weight = numbers["0.weight"][:, :, 0, 0]
    scale = numbers.get("1.weight", 1) / np.sqrt(numbers["1.running_var"] + 0.1)
    shift = numbers.get("0.bias", 0) - numbers["1.running_mean"]
    pixels = np.einsum("kc,nchw->nhwk", weight, x.detach().numpy())
    wanted = (pixels + shift) * scale + numbers.get("1.bias", 0)
    np.testing.assert_allclose(y.detach().permute(0, 2, 3, 1), wanted, rtol=1e-12, atol=1e-12)

    y.square().sum().backward()
    slope = 2 * wanted * scale
    np.testing.assert_allclose(x.grad, np.einsum("nhwk,kc->nchw", slope, weight), rtol=1e-10)
    found = layer[0].weight.grad[:, :, 0, 0]
    wanted_weight = np.einsum("nhwk,nchw->kc", slope, x.detach().numpy())
    np.testing.assert_allclose(found, wanted_weight, rtol=1e-10)


@pytest.mark.parametrize("kind", ["Conv2d", "Sequential", "Conv2dNormActivation"])
@pytest.mark.parametrize("norm_type", [FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm])
def test_all_forms_are_found_and_agree_with_the_layers_apart(kind, norm_type):
    torch.manual_seed(0)
    apart = pair(kind, with_numbers(norm_type(4))).eval()
    folded = fold_norms(copy.deepcopy(apart))
    assert isinstance(folded, (FoldingConv2d, FoldingSequential))
    assert list(folded.state_dict()) == list(apart.state_dict())
    x = torch.randn(2, 3, 16, 17)
    torch.testing.assert_close(folded(x), apart(x), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = folded(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), apart(x), rtol=0.05, atol=0.1)


def test_a_norm_that_learns_its_statistics_runs():
    layer = fold_norms(pair("Sequential", nn.BatchNorm2d(4))).train()
    layer(torch.randn(2, 3, 16, 16))
    assert layer[1].num_batches_tracked == 1 and layer[1].running_mean.abs().min() > 0
    without = fold_norms(pair("Sequential", nn.BatchNorm2d(4, track_running_stats=False))).eval()
    calls = calls_of(without[1])
    without(torch.randn(2, 3, 16, 16))
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["Conv2d", "Sequential"])
@pytest.mark.parametrize(("side", "runs"), [(10, 1), (11, 1), (12, 0)])
def test_few_pixels_are_normed_as_before(kind, side, runs):
    """27 weights a channel; 25 pixels of 10 px and of 11, 36 of 12."""
    norm = FrozenBatchNorm2d(4)
    layer = fold_norms(pair(kind, norm))
    calls = calls_of(norm)
    layer(torch.zeros(1, 3, side, side))
    assert len(calls) == runs
    assert layer(torch.zeros(0, 3, side, side)).shape[0] == 0


def test_what_comes_later_counts():
    """Weights that are loaded, a norm that is frozen, and a copy with weights of its own."""
    layer = fold_norms(nn.Sequential(pair("Sequential", nn.BatchNorm2d(4)))).train()
    twin = copy.deepcopy(layer)
    other = pair("Sequential", with_numbers(nn.BatchNorm2d(4))).eval()
    layer[0].load_state_dict(other.state_dict())
    FrozenBatchNorm2d.convert_frozen_batchnorm(layer)
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(layer(x), other(x), rtol=1e-5, atol=1e-5)
    assert (twin.eval()(x) - layer(x)).abs().max() > 0.1


def test_derived_classes_and_other_norms_are_left_alone():
    class Own(Conv2d):
        pass

    class OwnSequential(nn.Sequential):
        pass

    conv, norm = nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32)
    for layer in (
        Own(3, 4, 1, norm=FrozenBatchNorm2d(4)),
        OwnSequential(conv, norm),
        Conv2d(3, 4, 1),
        Conv2d(3, 32, 1, norm=nn.GroupNorm(32, 32)),
        nn.Sequential(conv, nn.GroupNorm(32, 32)),
    ):
        kind = type(layer)
        assert type(fold_norms(layer)) is kind


@pytest.mark.parametrize("config", CONFIGS)
def test_losses_gradients_and_features_of_detectors(config, make_batch, event_storage):
    batch, results = make_batch([2, 1], side=96), {}
    for folds in ("False", "True"):
        keys = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.FOLD_NORM", folds]
        torch.manual_seed(0)
        model = build_detector(get_config(config, keys))
        found = [x for x in model.modules() if isinstance(x, (FoldingConv2d, FoldingSequential))]
        assert (len(found) > 5) == (folds == "True")
        torch.manual_seed(0)
        losses = model.train()(batch)
        sum(losses.values()).backward()
        norms = [x.grad.norm() for x in model.parameters() if x.grad is not None]
        with torch.no_grad():
            features = model.eval().backbone(torch.rand(1, 3, 96, 96))
        results[folds] = losses, torch.stack(norms), features
    torch.testing.assert_close(results["True"], results["False"], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_compiled_network_is_left_to_the_compiler():
    norm = with_numbers(FrozenBatchNorm2d(4))
    layer = fold_norms(pair("Sequential", norm))
    x = torch.randn(1, 3, 16, 16)
    wanted = layer(x)
    graphs = []

    def look(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    compile_networks([layer], backend=look)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1 and "batch_norm" in graphs[0]
