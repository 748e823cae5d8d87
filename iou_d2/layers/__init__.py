"""Layers with compiled operators: precise RoI pooling, convolutions, batch norm."""

from .extension import HAS_EXTENSION
from .prroi_pool import PrRoIPool, prroi_pool, prroi_pool_reference

__all__ = ["HAS_EXTENSION", "PrRoIPool", "prroi_pool", "prroi_pool_reference"]
