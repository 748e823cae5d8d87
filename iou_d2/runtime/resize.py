"""Pillow's bilinear resize in NumPy: what Detectron2 trains and tests with.

Pillow averages all that a pixel covers when it shrinks, which OpenCV's INTER_LINEAR does not and
INTER_AREA does with other weights. The result is Pillow's to the last bit where it resizes columns
first, as it always did until version 12; version 13 begins with the rows of some images, which
changes bytes by 1 at most.

Shape letters: H and W of an image, T the pixels of the input that one of the output reads.
"""

from __future__ import annotations

import cv2
import numpy as np

# Pillow sums in whole numbers: weights in units of 2^-22, and the sum rounded to a byte.
UNIT = 1 << 22


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, channels) uint8 -> (height, width, channels), `size` as height, width: what
    `PIL.Image.resize(..., BILINEAR)` gives."""
    height, width = size
    if width != image.shape[1]:  # columns first, rounded to bytes, as Pillow does
        image = cv2.transpose(_resize_rows(cv2.transpose(image), width))
    return _resize_rows(image, height) if height != image.shape[0] else image


def _resize_rows(image: np.ndarray, height: int) -> np.ndarray:
    first, weights = taps(len(image), height)
    rows = image.reshape(len(image), -1)
    output = np.empty((height, rows.shape[1]), dtype=np.uint8)
    for index in range(height):
        seen = rows[first[index] : first[index] + weights.shape[1]].astype(np.float64)
        # float64 holds these whole numbers exactly.
        total = weights[index, : len(seen)] @ seen + UNIT // 2
        output[index] = total / UNIT  # a weighted mean of bytes, which is one
    return output.reshape(height, *image.shape[1:])


def taps(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `size` pixels each of `new_size` reads: the first, (new_size,), and the weights of
    it and those behind it, (new_size, T), whole numbers that sum to about UNIT."""
    scale = size / new_size
    reach = max(scale, 1.0)  # of the triangle around a pixel
    center = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((center - reach + 0.5).astype(int), 0)
    last = np.minimum((center + reach + 0.5).astype(int), size)
    index = first[:, None] + np.arange((last - first).max())
    # The order of operations is Pillow's, since the last bit counts.
    weights = np.maximum(1 - np.abs((index - center[:, None] + 0.5) * (1 / reach)), 0)
    weights[index >= last[:, None]] = 0
    weights *= 1 / np.add.accumulate(weights, axis=1)[:, -1:]
    return first, np.floor(weights * UNIT + 0.5)
