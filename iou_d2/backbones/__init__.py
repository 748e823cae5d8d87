"""Backbones, which register themselves by name."""

from . import deformable_resnet, mobilenet_v2, resnet10, ssd_vgg, vgg  # noqa: F401
