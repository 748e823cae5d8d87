"""The points of dense detectors, and boxes as distances from them.

Shape letters: L levels, H_l and W_l cells of a level. Points are (..., 2): x, y in pixels of the
network input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PointGrid:
    """One point in every cell of the feature maps of L levels.

    Args:
        strides: pixels of a cell of each level.
        offset: of the point in its cell, in cells: 0 the top left corner, 0.5 the centre.
    """

    strides: Sequence[int]
    offset: float

    def __call__(self, features: Sequence[Tensor]) -> list[Tensor]:
        """L maps (N, channels, H_l, W_l) -> L tensors (H_l * W_l, 2), float32, on their device.

        Row by row: x = (column + offset) * stride, y from the row.
        """
        return [
            _points_of_level(feature, stride, self.offset)
            for feature, stride in zip(features, self.strides)
        ]


def _points_of_level(feature: Tensor, stride: int, offset: float) -> Tensor:
    rows, columns = (
        (torch.arange(size, device=feature.device, dtype=torch.float32) + offset) * stride
        for size in feature.shape[-2:]
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)
