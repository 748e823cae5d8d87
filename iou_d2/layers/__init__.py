"""Layers with compiled operators, written on torch alone: precise RoI pooling, deformable
convolution."""

from .extension import HAS_EXTENSION
from .prroi_pool import PrRoIPool, prroi_pool, prroi_pool_reference

__all__ = ["HAS_EXTENSION", "PrRoIPool", "prroi_pool", "prroi_pool_reference"]
