"""Compiled layers, written on torch alone: precise RoI pooling."""

from .prroi_pool import HAS_EXTENSION, PrRoIPool, prroi_pool, prroi_pool_reference

__all__ = ["HAS_EXTENSION", "PrRoIPool", "prroi_pool", "prroi_pool_reference"]
