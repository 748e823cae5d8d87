"""Recalibration: the monotone function of what a detector claims that fits the truth best.

Shapes: D detections, B knots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Knots(NamedTuple):
    """Points of a piecewise linear function: `claimed` (B,) rises and so does `true` (B,)."""

    claimed: np.ndarray
    true: np.ndarray


def fit_knots(claimed: np.ndarray, true: np.ndarray, bins: int = 20) -> Knots:
    """Isotonic regression (Zadrozny and Elkan, 2002) of the means of bins that hold as many
    detections each; neighbours that it pools become one knot.

    Args:
        claimed, true: (D,) in [0, 1].
        bins: B at most; fewer where detections are fewer or claim the same.

    Raises ValueError: no detections, other shapes, or what is no number in [0, 1].
    """
    from scipy.optimize import isotonic_regression  # takes long to load

    claimed, true = np.asarray(claimed, np.float64), np.asarray(true, np.float64)
    if claimed.shape != true.shape or claimed.ndim != 1 or len(claimed) == 0:
        raise ValueError(
            f"Expected two arrays of one shape (D,) with D over 0, got {claimed.shape} and "
            f"{true.shape}."
        )
    if not all(((values >= 0) & (values <= 1)).all() for values in (claimed, true)):
        raise ValueError("What is claimed and what is true are numbers in [0, 1].")
    edges = np.unique(np.quantile(claimed, np.linspace(0, 1, bins + 1)))
    number = np.searchsorted(edges[1:-1], claimed, side="right")
    count = np.bincount(number)
    there = count > 0
    count = count[there]
    x, y = (np.bincount(number, values)[there] / count for values in (claimed, true))
    fit = isotonic_regression(y, weights=count)
    starts = fit.blocks[:-1]
    pooled = np.add.reduceat(x * count, starts) / np.add.reduceat(count, starts)
    return Knots(np.clip(pooled, 0, 1), np.clip(fit.x[starts], 0, 1))
