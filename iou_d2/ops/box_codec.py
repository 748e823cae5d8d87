"""What the four numbers that a head says of a point mean: the codecs of boxes.

A codec turns the raw outputs of a convolution into the distances from each point to the left, top,
right and bottom of its box, in pixels of the network input. It is a part that heads are given.

Shape letters: N images, L levels. Half precision, which cannot hold large boxes, becomes float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# exp of more than this is no side of a box: mmdetection's wh_ratio_clip of 16 / 1000, also from
# below.
MAX_LOG_RATIO = math.log(1000 / 16)


class BoxCodec(Protocol):
    """Raw outputs of a level -> distances."""

    # Whether the numbers are deltas of an anchor and not distances.
    of_anchors: ClassVar[bool]

    def __call__(self, raw: Tensor, scale: Tensor | float, level: int) -> Tensor:
        """Decode a level.

        Args:
            raw: (N, 4, H, W), (N, 4, 0, 0) for an empty map.
            scale: a factor of `raw`, learnt by level in most heads; 1.0 in those without it.
            level: 0 to L - 1.

        Returns:
            (N, 4, H, W) in float32 at least.
        """


def exp_distances(raw: Tensor, scale: Tensor | float, unit: Tensor | float) -> Tensor:
    """exp(scale * raw) * unit in float32, since half precision cannot hold large boxes."""
    return (scale * raw).float().exp() * unit


@dataclass(frozen=True)
class ExpDistances:
    """Distances by exp: FCOS as published in 2019 (arXiv 1904.01355, section 3.1), VarifocalNet.

    Args:
        units: pixels that a distance of 1 means, for each of the L levels.
    """

    units: Sequence[float]
    of_anchors: ClassVar[bool] = False

    def __call__(self, raw: Tensor, scale: Tensor | float, level: int) -> Tensor:
        return exp_distances(raw, scale, self.units[level])


@dataclass(frozen=True)
class ReluDistances:
    """Distances in strides, negative ones cut to 0: FCOS of arXiv 2006.09214, section 2.1.

    Args:
        strides: pixels of a cell, for each of the L levels.
    """

    strides: Sequence[float]
    of_anchors: ClassVar[bool] = False

    def __call__(self, raw: Tensor, scale: Tensor | float, level: int) -> Tensor:
        return F.relu((scale * raw).float()) * self.strides[level]


@dataclass(frozen=True)
class AnchorDeltas:
    """Deltas of the square anchor that is centred on the point: ATSS (arXiv 1912.02424), whose box
    regression is that of Faster R-CNN (arXiv 1506.01497, Eqn. 2). A distance may be negative, for
    the box of a point need not hold it.

    Args:
        sides: of the anchor in pixels, for each of the L levels.
        deviations: factors of dx, dy, dw and dh.
    """

    sides: Sequence[float]
    deviations: Sequence[float] = (0.1, 0.1, 0.2, 0.2)
    of_anchors: ClassVar[bool] = True

    def __call__(self, raw: Tensor, scale: Tensor | float, level: int) -> Tensor:
        deltas = (scale * raw).float()
        deltas = deltas * deltas.new_tensor(self.deviations).view(4, 1, 1)
        shift = deltas[:, :2] * self.sides[level]
        half = deltas[:, 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * (self.sides[level] / 2)
        return torch.cat([half - shift, half + shift], dim=1)
