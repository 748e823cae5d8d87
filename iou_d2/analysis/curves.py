"""Numbers from records: how well a score ranks boxes by how well they fit. Pure functions.

Shapes: D detections, B bins.
"""

from __future__ import annotations

import math

import numpy as np

from .records import Records


def correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Pearson's and Spearman's correlation of two arrays of shape (D,).

    Returns:
        Both in [-1, 1], or both NaN where they are not defined: fewer than two points, a constant
        array, or a value that is not finite.
    """
    # It takes as long to load as a fifth of all else that a command needs.
    from scipy.stats import pearsonr, spearmanr

    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"Expected two arrays of one shape (D,), got {x.shape} and {y.shape}.")
    if len(x) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.nan, math.nan
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan, math.nan
    return float(pearsonr(x, y)[0]), float(spearmanr(x, y)[0])


def select_localized(records: Records, min_iou: float = 0.5) -> np.ndarray:
    """(D,) bool: the detections whose true IoU is above `min_iou`, as in IoU-Net, Fig. 2."""
    return records.true_iou > min_iou


def localization_table(records: Records, min_iou: float = 0.5) -> dict[str, float]:
    """Correlation of each score with the true IoU, over detections with true IoU above `min_iou`.

    Returns:
        "pearson_<s>" and "spearman_<s>" for s in confidence, cls_score and, if the records have
        them, pred_iou and centerness; and "detections", over how many they are taken.
    """
    keep = select_localized(records, min_iou)
    table = {}
    for name, values in records.signals().items():
        pearson, spearman = correlation(values[keep], records.true_iou[keep])
        table[f"pearson_{name}"], table[f"spearman_{name}"] = pearson, spearman
    table["detections"] = int(keep.sum())
    return table


def binned_mean(x: np.ndarray, y: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The mean of y within each bin of x.

    Args:
        x, y: (D,).
        edges: (B + 1,) increasing. A bin holds its left edge; the last bin holds both.

    Returns:
        (B,) float64, NaN for a bin without points. Points outside of all bins are left out.
    """
    count, _ = np.histogram(x, bins=edges)
    total, _ = np.histogram(x, bins=edges, weights=y)
    return np.divide(total, count, out=np.full(len(count), math.nan), where=count > 0)
