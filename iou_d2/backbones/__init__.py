"""Backbones, which register themselves by name."""

from . import (  # noqa: F401
    deformable_resnet,
    mobilenet_v2,
    resnet10,
    retinanet_fpn,
    spp,
    ssd_vgg,
    torchvision_resnet,
    vgg,
)
