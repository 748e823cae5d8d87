"""The SPP block of YOLOv3-SPP behind any backbone, on its last feature before the FPN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, Backbone
from torch import Tensor, nn

from iou_d2.errors import InputError
from iou_d2.layers.spp import SPPBlock


@dataclass(frozen=True)
class _OnFeature:
    """A forward hook: `block` on the feature `name`. Not a closure, so that a copy of the backbone
    has a hook with its own block."""

    name: str
    block: nn.Module

    def __call__(
        self, module: nn.Module, inputs: tuple, features: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {**features, self.name: self.block(features[self.name])}


def add_spp_block(
    backbone: Backbone, kernels: Sequence[int] = (5, 9, 13), norm: str = ""
) -> Backbone:
    """Put an SPPBlock on the last feature that an FPN reads, or on the feature of the largest
    stride where `backbone` is no FPN, in place.

    The block is `backbone.spp`; all other parameters keep their names, so that weights of the
    backbone and of whole detectors load as without it, which a wrapping module would not allow.

    Returns:
        The backbone itself.

    Raises:
        ValueError: it has an SPP block already.
    """
    if hasattr(backbone, "spp"):
        raise ValueError(f"{type(backbone).__name__} has an SPP block already.")
    has_fpn = isinstance(backbone, FPN)
    network = backbone.bottom_up if has_fpn else backbone
    shapes = network.output_shape()
    last = backbone.in_features[-1] if has_fpn else max(shapes, key=lambda x: shapes[x].stride)
    backbone.spp = SPPBlock(shapes[last].channels, kernels, norm)
    network.register_forward_hook(_OnFeature(last, backbone.spp))
    return backbone


@BACKBONE_REGISTRY.register()
def build_spp_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """The backbone that MODEL.SPP_BLOCK.BACKBONE names, with an SPP block; see the keys of
    MODEL.SPP_BLOCK. Its norm is that of MODEL.FPN.NORM."""
    node = cfg.MODEL.SPP_BLOCK
    names = sorted(name for name, _ in BACKBONE_REGISTRY if name != "build_spp_backbone")
    if node.BACKBONE not in names:
        raise InputError(
            f"MODEL.SPP_BLOCK.BACKBONE is one of {', '.join(names)}, but it is {node.BACKBONE!r}."
        )
    if not node.KERNELS or not all(isinstance(k, int) and k % 2 and k > 0 for k in node.KERNELS):
        raise InputError(
            f"MODEL.SPP_BLOCK.KERNELS is a list of odd numbers, but it is {list(node.KERNELS)}."
        )
    backbone = BACKBONE_REGISTRY.get(node.BACKBONE)(cfg, input_shape)
    return add_spp_block(backbone, node.KERNELS, cfg.MODEL.FPN.NORM)
