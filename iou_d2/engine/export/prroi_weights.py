"""What a pixel counts in the bins of a RoI along an axis, Wx or Wy of layers/prroi_pool.py, and its
derivatives in the RoI's edges, as few plain operations: a graph has them at each step.

Shape letters: A axes, R RoIs, X pixels of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor


def edges_of(start: Tensor, end: Tensor, bins: int) -> Tensor:
    """(A, R), (A, R) -> (A, R, bins + 1)"""
    steps = [number / bins for number in range(bins + 1)]
    steps = torch.tensor(steps, dtype=start.dtype, device=start.device)
    return start[..., None] + (end - start)[..., None] * steps


def weights_of(edges: Tensor, places: Tensor) -> Tensor:
    """(A, R, bins, X): the integral of each pixel's hat over each bin, divided by the bin's
    length."""
    offsets = edges[..., None] - places[..., None, :]
    low, high = offsets[..., :-1, :], offsets[..., 1:, :]
    integral = _right_half(low, high) + _right_half(-high, -low)
    return integral * ((edges.shape[2] - 1) / _lengths(edges))


def slopes_of(edges: Tensor, places: Tensor, scales: Tensor, weights: Tensor) -> Tensor:
    """(A, R, 2 bins, X): derivatives of `weights` (A, R, bins, X) in the first edge, then in the
    last, in pixels of the input, of which one is `scales` (R,) feature pixels.

    An edge between them moves with both. What a weight gains from its own edges is the hat there,
    over the bin's length; what it loses from a longer bin is itself, over the length of all.
    """
    hats = (1.0 - (edges[..., None] - places[..., None, :]).abs()).clamp(min=0.0)
    low, high = hats[..., :-1, :], hats[..., 1:, :]
    bins = edges.shape[2] - 1
    numbers = torch.tensor([[x] for x in range(bins)], dtype=edges.dtype, device=edges.device)
    of_last = high * (numbers + 1) - low * numbers - weights
    of_first = (high - low) * bins - of_last
    return torch.cat([of_first, of_last], dim=2) * (scales[:, None, None] / _lengths(edges))


def _right_half(low: Tensor, high: Tensor) -> Tensor:
    """As layers/prroi_pool.py has it for autograd, which does not come here."""
    low, high = low.clamp(0.0, 1.0), high.clamp(0.0, 1.0)
    return (high - low) * (1.0 - (low + high) / 2)


def _lengths(edges: Tensor) -> Tensor:
    """(A, R, 1, 1), from the first edge to the last."""
    return (edges[..., -1] - edges[..., 0])[..., None, None]
