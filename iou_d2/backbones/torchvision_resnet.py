"""The ResNet with FPN whose frozen batch norm adds an epsilon of its own to variances.

The weights that torchvision published before 0.8 were trained with 0. Variances of filters that
never fire are far below Detectron2's 1e-5, so that no other variance makes up for the difference.
"""

from __future__ import annotations

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone

from .retinanet_fpn import build_resnet_fpn_p6p7_of_p5


@BACKBONE_REGISTRY.register()
def build_torchvision_resnet_fpn_backbone(cfg, input_shape) -> FPN:
    """Detectron2's `build_resnet_fpn_backbone` with MODEL.RESNETS.FROZEN_BN_EPS."""
    return _with_frozen_bn_eps(cfg, build_resnet_fpn_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_torchvision_resnet_fpn_p6p7_backbone(cfg, input_shape) -> FPN:
    """That of `retinanet_resnet50_fpn`, p6 and p7 of p5, with MODEL.RESNETS.FROZEN_BN_EPS."""
    return _with_frozen_bn_eps(cfg, build_resnet_fpn_p6p7_of_p5(cfg, input_shape))


def _with_frozen_bn_eps(cfg, fpn: FPN) -> FPN:
    eps = max(cfg.MODEL.RESNETS.FROZEN_BN_EPS, torch.finfo(torch.float32).tiny)  # PyTorch refuses 0
    for module in fpn.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = eps
    return fpn
