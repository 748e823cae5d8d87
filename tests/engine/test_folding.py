"""Folded networks against the same modules as they come, in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from iou_d2 import get_config
from iou_d2.engine import folding
from iou_d2.engine.build import as_configured, build_detector
from iou_d2.engine.folding import FoldedSequential, fold_norms
from iou_d2.engine.freeze import freeze


class Operators(TorchDispatchMode):
    """Names of the operators that run within it."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))

    def counts(self, parts: Iterable[str]) -> dict[str, int]:
        """How many names have each of `parts`."""
        return {part: sum(part in name for name in self.names) for part in parts}


def shuffled(network: nn.Module) -> nn.Module:
    """`network` with norms that do something."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if getattr(module, "running_var", None) is not None:
            size = module.running_var.shape
            module.running_mean.copy_(0.3 * torch.randn(size, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(size, generator=generator))
            module.weight.data.copy_(0.5 + torch.rand(size, generator=generator))
            module.bias.data.copy_(0.3 * torch.randn(size, generator=generator))
    return network


def backbone(config: str, *overrides: str) -> nn.Module:
    cfg = get_config(config, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *overrides])
    torch.manual_seed(0)
    return shuffled(build_model(cfg).backbone).eval()


def folded(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    fold_norms(network)
    return network


def resnet(depth: int, norm: str = "FrozenBN") -> ResNet:
    """With all its features; the first block behind "stem" adds that map itself in a ResNet-18."""
    torch.manual_seed(0)
    stages = ResNet.make_default_stages(depth, norm=norm)
    features = ["stem", "res2", "res3", "res4", "res5"]
    return shuffled(ResNet(BasicStem(norm=norm), stages, out_features=features)).eval()


def images(number: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(number, 3, 64, 96, generator=generator, dtype=dtype)


def error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The largest, of each feature as a share of its largest number."""
    assert found.keys() == exact.keys()
    shares = [(found[k].double() - exact[k]).abs().max() / exact[k].abs().max() for k in exact]
    return max(share.item() for share in shares)


NETWORKS = {
    "MobileNetV2": lambda: backbone("quick/vfnet_own_data"),
    "MobileNetV2, frozen": lambda: backbone(
        "quick/ssd_own_data", "MODEL.MOBILENET_V2.NORM", "FrozenBN"
    ),
    "ResNet-10": lambda: backbone("quick/vfnet_shapes"),
    "ResNet-18": lambda: resnet(18),
    "ResNet-50": lambda: resnet(50),
    "ResNet-50, batch norm": lambda: resnet(50, "BN"),
    "ResNet-50, group norm": lambda: backbone("retinanet_R_50_FPN_1x", "MODEL.RESNETS.NORM", "GN"),
    "deformable": lambda: backbone("vfnet_R_50_FPN_dcn_2x_ms"),
    "VGG-16": lambda: backbone("ssd300_VGG16_voc"),
}


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
        # The stem of a ResNet-50 has its ReLU before a pool, and first blocks their shortcuts.
        (lambda: resnet(50), {"aten::convolution": 5, "_convolution_pointwise": 48, "relu": 1}),
        # Seventeen projections have no activation.
        (
            lambda: build_model(own_data()).backbone.bottom_up.eval(),
            {"aten::convolution": 17, "_convolution_pointwise": 34},
        ),
    ],
)
@torch.no_grad()
def test_maps_are_written_once(network, left):
    with Operators() as operators:
        folded(network())(images().contiguous(memory_format=torch.channels_last))
    none = dict.fromkeys(("batch_norm", "aten::convolution", "_convolution_pointwise", "relu"), 0)
    assert operators.counts(none) == {**none, **left}


@torch.no_grad()
def test_a_traced_graph_runs_elsewhere():
    """It has no operator of oneDNN or of our own, which only a CPU with the same torch has."""
    x = images().contiguous(memory_format=torch.channels_last)
    for network in (resnet(18), backbone("quick/vfnet_own_data").bottom_up):
        traced = torch.jit.trace(folded(network), x, strict=False)
        torch.testing.assert_close(traced(x)["res5"], network(x)["res5"], rtol=1e-4, atol=1e-4)
        kinds = {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
        assert kinds == {"aten", "prim"}


@torch.no_grad()
def test_without_the_operators_of_onednn_norms_are_folded(monkeypatch):
    network = resnet(18)
    x = images().contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(network).double()(x.double())
    monkeypatch.setattr(folding, "_HAS_ONEDNN", False)
    with Operators() as operators:
        found = folded(network)(x)
    assert error(found, exact) < 3e-6
    assert operators.counts(["pointwise", "batch_norm"]) == {"pointwise": 0, "batch_norm": 0}


@torch.no_grad()
def test_changed_weights_count_at_once():
    """Also those that were changed behind autograd's back."""
    plain, x = resnet(18), images()
    found = folded(plain)
    found(x)
    for network in (plain, found):
        for module in network.modules():
            if isinstance(module, Conv2d):
                module.weight.data.mul_(1.1)
                module.norm.running_var.numpy()[:] = 2
    exact = copy.deepcopy(plain).double()(x.double())
    assert error(found(x), exact) < 3e-6


@torch.no_grad()
def test_a_copy_computes_with_its_own_weights():
    network = folded(resnet(18))
    twin = copy.deepcopy(network)
    before = network(images())
    for parameter in twin.parameters():
        parameter.zero_()
    assert twin(images())["res5"].abs().max() < 10
    torch.testing.assert_close(network(images())["res5"], before["res5"], rtol=0, atol=0)
    assert list(network.state_dict()) == list(resnet(18).state_dict())


@torch.no_grad()
def test_no_images_give_no_features():
    x = torch.zeros(0, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    for network in (resnet(18), backbone("quick/vfnet_own_data")):
        plain, found = network(x), folded(network)(x)
        assert {k: y.shape for k, y in found.items()} == {k: y.shape for k, y in plain.items()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet-18"])
def test_hooks_are_called_and_see_what_stays(name, training):
    """One after another, so that what is left of a network stays folded."""
    network = NETWORKS[name]().train(training)
    x = images().contiguous(memory_format=torch.channels_last)
    kinds = (nn.Conv2d, nn.BatchNorm2d, FrozenBatchNorm2d, nn.ReLU6, BasicBlock, nn.Sequential)
    names = [n for n, m in network.named_modules() if isinstance(m, kinds)]
    for name in names[:: max(len(names) // 12, 1)]:
        (wanted, later), (found, found_later) = (
            seen_by_hook(each, name, x, training)
            for each in (copy.deepcopy(network), folded(network))
        )
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        # Detectron2's blocks write activations over the outputs of their convolutions.
        assert not torch.equal(later, wanted) or torch.equal(found_later, found)


def seen_by_hook(network: nn.Module, name: str, x: torch.Tensor, with_gradient: bool) -> tuple:
    """The output of a module as its hook sees it, and as it is in the end."""
    outputs = []
    module = network.get_submodule(name)
    module.register_forward_hook(lambda m, inputs, y: outputs.extend([y.detach().clone(), y]))
    with torch.set_grad_enabled(with_gradient):
        network(x)
    return tuple(outputs)


@torch.no_grad()
def test_pruned_weights_count():
    """Pruning computes weights in a hook before each forward."""
    plain = backbone("quick/vfnet_own_data")
    for module in [m for m in plain.modules() if isinstance(m, nn.Conv2d)]:
        prune.l1_unstructured(module, "weight", 0.5)
    found = folded(plain)
    for network in (plain, found):
        for parameter in network.parameters():
            parameter.mul_(0.9)
    exact = copy.deepcopy(plain).double()(images().double())
    assert error(found(images()), exact) < 3e-6


def test_norms_that_are_frozen_afterwards_are_folded():
    network = nn.ModuleDict({"backbone": resnet(18, "BN"), "head": nn.Conv2d(512, 1, 1)}).train()
    fold_norms(network)
    freeze(network, ["backbone.res2", "backbone.stem"])
    assert isinstance(network["backbone"].res2[0].conv1.norm, FrozenBatchNorm2d)
    plain = copy.deepcopy(network["backbone"].res2).double()
    for module in plain.modules():
        module.__dict__.pop("forward", None)
    x = torch.randn(2, 64, 24, 32).contiguous(memory_format=torch.channels_last)
    with Operators() as operators:
        found = network["backbone"].res2(x)
    assert operators.counts(["batch_norm"]) == {"batch_norm": 0}
    torch.testing.assert_close(found.double(), plain(x.double()), rtol=1e-5, atol=1e-5)


def test_what_is_built_for_a_cpu_is_folded_unless_it_is_compiled(monkeypatch):
    model = build_detector(own_data())
    convs = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert sum(isinstance(vars(m).get("forward"), FoldedSequential) for m in model.modules()) > 17
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convs)
    monkeypatch.setattr("iou_d2.engine.build.require_compiler", lambda device: None)
    model = as_configured(build_model(own_data()), own_data("MODEL.COMPILE", "True"))
    assert not any(isinstance(vars(m).get("forward"), FoldedSequential) for m in model.modules())


def own_data(*overrides: str):
    return get_config(
        "quick/vfnet_own_data", ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *overrides]
    )
