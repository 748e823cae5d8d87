"""Networks for the tests of folded norms, and how they are compared."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from iou_d2 import get_config
from iou_d2.engine.folding import fold_norms


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


def own_data(*overrides: str) -> CfgNode:
    return get_config(
        "quick/vfnet_own_data", ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *overrides]
    )
