"""The masks of an exported Mask R-CNN in their image, as Detectron2's `paste_masks_in_image` has
them.

Shape letters: D detections, M the side of a mask, H x W the image.
"""

from __future__ import annotations

import numpy as np


def paste_masks(
    masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int], threshold: float = 0.5
) -> np.ndarray:
    """Which pixels of an image belong to each object.

    Args:
        masks: (D, M, M) probabilities of the parts of each box.
        boxes: (D, 4) XYXY in pixels of the image.
        size: H and W of it.
        threshold: a probability of at least that, between those of the mask by bilinear
            interpolation, is one of an object.

    Returns:
        (D, H, W) bool. (0, H, W) for no detections; a box without an area has no pixels.
    """
    pasted = np.zeros((len(masks), *size), dtype=bool)
    for mask, box, image in zip(masks, boxes, pasted):
        # The pixels that a mask, which fades out over half a cell beyond its box, may reach.
        first = np.maximum(np.floor(box[:2]) - 1, 0).astype(int)
        last = np.minimum(np.ceil(box[2:]) + 1, size[::-1]).astype(int)
        columns, rows = (
            _weights(np.arange(first[axis], last[axis]), box[axis], box[axis + 2], len(mask))
            for axis in (0, 1)
        )
        part = rows @ mask @ columns.T
        image[first[1] : last[1], first[0] : last[0]] = part >= threshold
    return pasted


def _weights(pixels: np.ndarray, start: float, end: float, cells: int) -> np.ndarray:
    """(pixels, cells): how much of each cell of a mask between `start` and `end` is at the middle
    of each pixel."""
    if not end > start:
        return np.zeros((len(pixels), cells), dtype=np.float32)
    where = (pixels + 0.5 - start) / (end - start) * cells - 0.5
    hats = 1 - np.abs(where[:, None] - np.arange(cells))
    return np.maximum(hats, 0).astype(np.float32)
