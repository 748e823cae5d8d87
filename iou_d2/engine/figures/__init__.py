"""What the figures of IoU-Net (arXiv 1807.11590) are drawn from: one pass of a detector over a test
set that keeps what it says before NMS."""

from __future__ import annotations

from .candidates import source_of
from .gather import Gathered, gather
from .variants import VARIANTS

__all__ = ["VARIANTS", "Gathered", "gather", "source_of"]
