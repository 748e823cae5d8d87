"""What a predicted IoU is worth: a monotone function of it, given by knots.

Shape letters: B knots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Predicted IoUs in [0, 1] of any shape -> what they are worth, in [0, 1], of that shape.
Calibration = Callable[[Tensor], Tensor]


def as_predicted(iou: Tensor) -> Tensor:
    """No calibration."""
    return iou


@dataclass(frozen=True)
class PiecewiseLinear:
    """Straight lines between knots; beyond the first and the last knot the nearest line goes on,
    within [0, 1].

    Args:
        predicted: (B,) rising.
        true: (B,) not falling. A single knot is a constant.

    Raises ValueError: no knot, other lengths, numbers beyond [0, 1] or in another order.
    """

    predicted: Sequence[float]
    true: Sequence[float]

    def __post_init__(self) -> None:
        if not self.predicted or len(self.predicted) != len(self.true):
            raise ValueError(
                f"Knots are pairs, at least one, not {len(self.predicted)} predicted and "
                f"{len(self.true)} true IoUs."
            )
        if not all(0 <= x <= 1 for x in (*self.predicted, *self.true)):
            raise ValueError("A knot is a predicted and a true IoU, both in [0, 1].")
        steps = zip(self.predicted, self.predicted[1:], self.true, self.true[1:])
        if not all(x < x_next and y <= y_next for x, x_next, y, y_next in steps):
            raise ValueError("The predicted IoUs of knots rise, and their true IoUs do not fall.")

    def __call__(self, iou: Tensor) -> Tensor:
        # As a sum of clamps it has a gradient, and any runtime can do it.
        worth = torch.full_like(iou, self.true[0])
        inner = self.predicted[1:-1]
        knots = zip(self.predicted, self.predicted[1:], self.true, self.true[1:])
        limits = zip((-math.inf, *inner), (*inner, math.inf))
        for (x, x_next, y, y_next), (low, high) in zip(knots, limits):
            worth = worth + (y_next - y) / (x_next - x) * (iou.clamp(low, high) - x)
        return worth.clamp(0, 1)
