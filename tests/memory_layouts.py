"""The ways in which a feature map may lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def sliced(x: Tensor) -> Tensor:
    """Every other column of a wider map, without its first and last channel."""
    n, c, h, w = x.shape
    part = x.new_zeros(n, c + 2, h, 2 * w)[:, 1:-1, :, ::2]
    return part.copy_(x)


def some_channels(x: Tensor) -> Tensor:
    """Some of more channels that lie side by side: pixels begin anywhere."""
    n, c, h, w = x.shape
    part = x.new_zeros(n, h, w, c + 3)[..., 1 : c + 1].permute(0, 3, 1, 2)
    return part.copy_(x)


def misaligned(x: Tensor) -> Tensor:
    """Contiguous, from the second element of its memory on."""
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


def misaligned_channels_last(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.new_zeros(x.numel() + 1)[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)


def expanded(x: Tensor) -> Tensor:
    """The first channel as all of them, with a stride of 0."""
    return x[:, :1].expand_as(x)


# A contiguous (N, C, H, W) -> another of that shape, and but for `expanded` of those values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "sliced": sliced,
    "some_channels": some_channels,
    "misaligned": misaligned,
    "misaligned_channels_last": misaligned_channels_last,
    "expanded": expanded,
}
