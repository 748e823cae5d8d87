"""Backbones, which register themselves by name."""

from . import deformable_resnet, linear_p7, mobilenet_v2, resnet10, vgg  # noqa: F401
