"""What a pixel counts in the bins of a RoI along an axis, Wx or Wy of layers/prroi_pool.py, and its
derivatives in the RoI's edges, as plain operations.

Shape letters: R RoIs, X pixels of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iou_d2.layers.prroi_pool import right_half


def edges_of(start: Tensor, end: Tensor, bins: int) -> Tensor:
    """(R,), (R,) -> (R, bins + 1)"""
    steps = torch.arange(bins + 1, dtype=start.dtype, device=start.device) / bins
    return start[:, None] + (end - start)[:, None] * steps


def weights_of(edges: Tensor, places: Tensor) -> Tensor:
    """(R, bins, X): the integral of each pixel's hat over each bin, divided by the bin's length."""
    offsets = edges[:, :, None] - places[:, None]
    low, high = offsets[:, :-1], offsets[:, 1:]
    integral = right_half(low, high) + right_half(-high, -low)
    bins = edges.shape[1] - 1
    return integral * bins / (edges[:, -1:] - edges[:, :1])[:, :, None]


def slopes_of(edges: Tensor, places: Tensor, scales: Tensor) -> Tensor:
    """(R, 2 bins, X): derivatives of the weights in the first edge, then in the last, in pixels of
    the input, of which one is `scales` (R,) feature pixels.

    An edge between them moves with both. What a weight gains from its own edges is the hat there,
    over the bin's length; what it loses from a longer bin is itself, over the length of all.
    """
    hats = (1.0 - (edges[:, :, None] - places[:, None]).abs()).clamp(min=0.0)
    low, high = hats[:, :-1], hats[:, 1:]
    bins = edges.shape[1] - 1
    numbers = torch.arange(bins, dtype=edges.dtype, device=edges.device)[:, None]
    of_last = high * (numbers + 1) - low * numbers - weights_of(edges, places)
    of_first = (high - low) * bins - of_last
    per_length = (scales[:, None] / (edges[:, -1:] - edges[:, :1]))[:, :, None]
    return torch.cat([of_first, of_last], dim=1) * per_length
