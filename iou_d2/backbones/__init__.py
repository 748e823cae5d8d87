"""Backbones, which register themselves by name."""

from . import deformable_resnet, resnet10, vgg  # noqa: F401
