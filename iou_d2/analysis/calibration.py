"""Whether scores mean what they say. Pure functions.

Shapes: D detections, B bins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .curves import binned_mean


class Reliability(NamedTuple):
    """A reliability diagram.

    Attributes:
        count: (B,) detections in each bin.
        claimed: (B,) mean of what they claim; NaN for an empty bin.
        true: (B,) mean of what is true of them; NaN for an empty bin.
        error: the expected calibration error, mean of |true - claimed| over bins, weighted by
            their counts, in [0, 1]; NaN without detections.
    """

    count: np.ndarray
    claimed: np.ndarray
    true: np.ndarray
    error: float


def reliability(claimed: np.ndarray, true: np.ndarray, bins: int = 10) -> Reliability:
    """Hold a confidence against what it should be: 1 for a detection that finds an object and 0 for
    a false one, or the true IoU for a predicted IoU.

    The error is that of Guo et al., On Calibration of Modern Neural Networks, 2017, Eqn. 3, for
    detections as in Kueppers et al., Multivariate Confidence Calibration, 2020, by score alone.

    Args:
        claimed: (D,) in [0, 1].
        true: (D,) in [0, 1].
        bins: of equal width.

    Raises ValueError: other shapes, or a claim that is no number in [0, 1].
    """
    claimed, true = np.asarray(claimed, np.float64), np.asarray(true, np.float64)
    if claimed.shape != true.shape or claimed.ndim != 1:
        raise ValueError(
            f"Expected two arrays of one shape (D,), got {claimed.shape} and {true.shape}."
        )
    if not ((claimed >= 0) & (claimed <= 1)).all():
        raise ValueError("What is not in [0, 1] is no probability, and has no calibration.")
    edges = np.linspace(0, 1, bins + 1)
    count, _ = np.histogram(claimed, bins=edges)
    means = [binned_mean(claimed, values, edges) for values in (claimed, true)]
    error = float("nan")
    if len(claimed):
        error = float(np.nansum(count * np.abs(means[0] - means[1])) / len(claimed))
    return Reliability(count, *means, error)
