"""Backbones, which register themselves by name."""

from . import (  # noqa: F401
    deformable_resnet,
    linear_p7,
    mobilenet_v2,
    resnet10,
    torchvision_resnet,
    vgg,
)
