"""What folding leaves as it was: weights that change, copies, hooks, norms that freeze, graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.utils import prune

from iou_d2 import get_config
from iou_d2.engine import folding
from iou_d2.engine.build import as_configured, build_detector
from iou_d2.engine.folding import FoldedSequential, fold_norms
from iou_d2.engine.freeze import freeze
from iou_d2.layers import HAS_EXTENSION
from networks_to_fold import NETWORKS, Operators, backbone, error, folded, images, own_data, resnet


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


@pytest.mark.skipif(not HAS_EXTENSION, reason="without the compiled operators")
@pytest.mark.parametrize("name", ["vfnet", "iou_retinanet", "ssd", "faster_rcnn"])
def test_operators_of_a_whole_detector(name, make_batch):
    """Convolutions of FPN, RPN and heads and RoIAlign are compiled; losses and gradients agree with
    the plain ones."""
    cfg = get_config(f"quick/{name}_own_data", ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    torch.manual_seed(0)
    plain = build_model(cfg).train()
    batch, results = make_batch([3, 2], 2, side=256), []
    for model in (plain, as_configured(copy.deepcopy(plain), cfg)):
        torch.manual_seed(1)
        with EventStorage(), Operators() as operators:
            losses = model(batch)
            sum(losses.values()).backward()
        # In one, since those of biases before a batch norm are rounding alone.
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((losses, gradient, operators))
    (losses, gradient, _), (found, of_found, operators) = results
    for key, loss in losses.items():
        assert found[key].item() == pytest.approx(loss.item(), rel=1e-3), key
    # Of random weights it is 0.01 off beside float64, folded or not.
    assert (of_found - gradient).norm() < 0.03 * gradient.norm()
    convolutions = [f"iou_d2::conv3x3{of}" for of in ("", "_of_input", "_of_weight")]
    assert min(map(operators.names.count, convolutions)) >= 3
    has_rois = name == "faster_rcnn"
    for operator in ("iou_d2::roi_align", "iou_d2::roi_align_backward"):
        assert (operator in operators.names) == has_rois
    assert not any("torchvision::roi_align" in operator for operator in operators.names)


def test_what_is_built_for_a_cpu_is_folded_unless_it_is_compiled(monkeypatch):
    model = build_detector(own_data())
    convs = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert sum(isinstance(vars(m).get("forward"), FoldedSequential) for m in model.modules()) > 17
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convs)
    monkeypatch.setattr("iou_d2.engine.build.require_compiler", lambda device: None)
    model = as_configured(build_model(own_data()), own_data("MODEL.COMPILE", "True"))
    assert not any(isinstance(vars(m).get("forward"), FoldedSequential) for m in model.modules())
