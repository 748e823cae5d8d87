"""Whether the boxes of a COCO file are what COCO says: [x, y, width, height] in pixels."""

from __future__ import annotations

import numpy as np

# Fewer boxes than these are no pattern: an honest small set may have an overhanging box or two.
_MOST_AT_LEAST = 5
_CORNERS_AT_LEAST = 2


def doubt_about_boxes(boxes: np.ndarray, sizes: np.ndarray) -> str | None:
    """What the boxes look like, as a sentence, where they are hardly XYWH in pixels; else None.

    Only boxes with an area count. A box sticks out if more than a tenth of its area is outside its
    image: rounding and loose drawing stay below.

    - Fractions: more than half of the boxes lie in the first pixel, from 0 to 1.
    - Corners: all boxes (98%) lie in their image if read as XYXY, and as XYWH three in ten stick
      out, at least two; from 20 boxes on, one in ten is enough.
    - Anything else of which more than half, at least five, stick out.

    Args:
        boxes: (N, 4) XYWH.
        sizes: (N, 2) width and height of the image of each box.
    """
    has_area = (boxes[:, 2:] > 0).all(axis=1)
    boxes, sizes = boxes[has_area], sizes[has_area]
    count = len(boxes)
    if count == 0:
        return None
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    sides = np.clip(np.minimum(end, sizes) - np.maximum(start, 0), 0, None)
    out = sides.prod(axis=1) < 0.9 * boxes[:, 2:].prod(axis=1)
    tiny = (boxes[:, 2:] < 1).all(axis=1)
    shares = (
        f"{out.sum()} of {count} boxes stick out of their image by more than a tenth, "
        f"{tiny.sum()} are smaller than a pixel"
    )
    in_first_pixel = ((boxes >= 0) & (boxes <= 1)).all(axis=1) & (sizes > 2).all(axis=1)
    if in_first_pixel.sum() > count / 2:
        return f"its boxes look like fractions of the image, not pixels: {shares}"
    corners = (boxes[:, 2:] > start) & (boxes[:, 2:] <= sizes + 1) & (start >= -1)
    needed = 0.1 * count if count >= 20 else max(_CORNERS_AT_LEAST, 0.3 * count)
    if corners.all(axis=1).mean() >= 0.98 and out.sum() >= needed:
        return f"its boxes look like corners [x0, y0, x1, y1], not [x, y, w, h]: {shares}"
    if out.sum() > count / 2 and out.sum() >= _MOST_AT_LEAST:
        return f"most of its boxes do not fit their images: {shares}"
    return None
