"""Precise RoI pooling over the levels of a pyramid and its gradient in the boxes, as tensor
operations that ONNX and TorchScript hold, with any number of images, sizes and boxes.

Arithmetic as in layers/prroi_pool.py (arXiv 1807.11590, eq. 2-4): out = Wy F Wx^T. Here F is but
the window of the map that a box touches, looked up in a table of all pixels of all levels, a few
boxes at a time. Shape letters: N images, C channels, H x W feature map, L levels, R RoIs, P x Q
bins, S pixels of all levels and images, Y x X pixels of a window. Boxes are XYXY in pixels of the
network input.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Boxes
from torch import Tensor

from iou_d2.detectors.pooler import PrRoIPooler

# Pixels of all windows that are looked up at a time: 256 MiB for 256 channels.
PIXELS_AT_ONCE = 2**18


class FeatureTable(NamedTuple):
    """Feature maps as one table of pixels. Levels are numbered from 0."""

    pixels: Tensor  # (S, C), level by level, image by image, row by row
    first: Tensor  # (L,) int64, where a level begins
    heights: Tensor  # (L,) int64
    widths: Tensor  # (L,) int64
    scales: Tensor  # (L,) float64, feature pixels an input pixel, 1 / stride
    images: Tensor  # (1,) int64, N


def feature_table(features: Sequence[Tensor], scales: Sequence[float]) -> FeatureTable:
    """The table of L maps (N, C, H_l, W_l), in float32 at least; one serves all poolings."""
    one = torch.ones(1, dtype=torch.int64, device=features[0].device)
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    heights = torch.cat([one * x.shape[2] for x in features])
    widths = torch.cat([one * x.shape[3] for x in features])
    images = one * features[0].shape[0]
    sizes = images * heights * widths
    pixels = [x.to(dtype).permute(0, 2, 3, 1).flatten(0, 2) for x in features]
    scales = torch.tensor(scales, dtype=torch.float64, device=one.device)
    first = sizes.cumsum(0) - sizes
    return FeatureTable(torch.cat(pixels), first, heights, widths, scales, images)


def assigned_levels(pooler: PrRoIPooler, boxes: Tensor) -> Tensor:
    """(R,) int64: what `pooler.assign_levels` says of boxes (R, 4), with any R in a graph."""
    if len(pooler.level_poolers) == 1:
        return torch.zeros_like(boxes[:, 0], dtype=torch.int64)
    return pooler.assign_levels([Boxes(boxes)])


class RoIs(NamedTuple):
    """RoIs as the table sees them."""

    origin: Tensor  # (R,) int64, the first pixel in the table of a RoI's map
    sizes: Tensor  # (R, 2) int64, W and H of that map
    x_edges: Tensor  # (R, Q + 1) float64, of its bins in feature pixels
    y_edges: Tensor  # (R, P + 1)
    valid: Tensor  # (R,) whether it has an area, is finite and of one of the images


def place(
    table: FeatureTable,
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    output_size: tuple[int, int],
    aligned: bool = True,
) -> RoIs:
    """RoIs of boxes (R, 4) with their image and level, both (R,) int64, that `pool` takes.

    A box of an image that there is not, such as -1, is pooled to 0.
    """
    # In float64: float32 leaves no digits of sides of a thousandth of a pixel.
    boxes = boxes.double() * table.scales[level][:, None] - (0.5 if aligned else 0.0)
    sides = boxes[:, 2:] - boxes[:, :2]
    valid = (sides > 1e-9).all(1) & boxes.isfinite().all(1)
    valid = valid & (image >= 0) & (image < table.images)
    boxes = torch.where(valid[:, None], boxes, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]))
    height, width = table.heights[level], table.widths[level]
    image = torch.where(valid, image, torch.zeros_like(image))
    return RoIs(
        table.first[level] + image * height * width,
        torch.stack([width, height], dim=1),
        _edges(boxes[:, 0], boxes[:, 2], output_size[1]),
        _edges(boxes[:, 1], boxes[:, 3], output_size[0]),
        valid,
    )


def pool(table: FeatureTable, rois: RoIs) -> Tensor:
    """(R, C, P, Q): what `prroi_pool` gives for each RoI. No RoIs: an empty result."""
    pooled = _scripted(_pool)(table.pixels, *rois[:4], PIXELS_AT_ONCE).permute(0, 3, 1, 2)
    return torch.where(rois.valid[:, None, None, None], pooled, torch.zeros_like(pooled))


def box_gradient(table: FeatureTable, rois: RoIs, level: Tensor, upstream: Tensor) -> Tensor:
    """Gradient (R, 4) in the boxes of a scalar whose gradient in the pooled values is `upstream`
    (R, C, P, Q); `level` as given to `place`. 0 where a RoI is not valid."""
    upstream = upstream.permute(0, 2, 3, 1).contiguous()
    gradient = _scripted(_box_gradient)(table.pixels, *rois[:4], upstream, PIXELS_AT_ONCE)
    gradient = gradient * table.scales[level][:, None]
    gradient = torch.where(rois.valid[:, None], gradient, torch.zeros_like(gradient))
    return gradient.to(table.pixels.dtype)


def _edges(start: Tensor, end: Tensor, bins: int) -> Tensor:
    """(R,), (R,) -> (R, bins + 1)"""
    steps = torch.arange(bins + 1, dtype=start.dtype, device=start.device) / bins
    return start[:, None] + (end - start)[:, None] * steps


def _scripted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` as a graph can hold it: a tracer would unroll its loops and make constants of the
    sizes of windows, and TorchScript does neither."""
    if not torch.jit.is_tracing():
        return function
    with warnings.catch_warnings():  # of its own age
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)


def _window(edges: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The first and last pixel (R,) that bins with these edges touch on a side of `size` (R,)."""
    zero = torch.zeros_like(size)
    # A far edge is clipped before it becomes a whole number, which might not hold it.
    limit = size.to(edges.dtype)
    first = torch.minimum(edges[:, 0].floor().clamp(min=-1.0), limit).to(torch.int64)
    last = torch.minimum(edges[:, -1].ceil().clamp(min=-1.0), limit).to(torch.int64)
    return (
        torch.minimum(torch.maximum(first, zero), size - 1),
        torch.minimum(torch.maximum(last, zero), size - 1),
    )


def _right_half(low: Tensor, high: Tensor) -> Tensor:
    """As in layers/prroi_pool.py."""
    low, high = low.clamp(0.0, 1.0), high.clamp(0.0, 1.0)
    return (high - low) * (1.0 - (low + high) / 2.0)


def _weights(edges: Tensor, pixels: Tensor, size: Tensor) -> Tensor:
    """(R, bins, X): the integral of each pixel's hat over each bin, divided by the bin's length.
    0 for pixels (R, X) beyond the map."""
    offsets = edges[:, :, None] - pixels[:, None].to(edges.dtype)
    low, high = offsets[:, :-1], offsets[:, 1:]
    integral = _right_half(low, high) + _right_half(-high, -low)
    bins = edges.shape[1] - 1
    length = (edges[:, -1:] - edges[:, :1]) / bins
    return integral / length[:, :, None] * (pixels < size[:, None])[:, None].to(edges.dtype)


def _edge_gradient(edges: Tensor, pixels: Tensor, size: Tensor, upstream: Tensor) -> Tensor:
    """Gradient (R, 2) in the first and the last edge of a scalar whose gradient in the weights is
    `upstream` (R, bins, X).

    An edge between them moves with both. What a weight gains from its own edges is the hat there,
    over the bin's length; what it loses from a longer bin is itself, over the length of all.
    """
    weights = _weights(edges, pixels, size)
    bins = edges.shape[1] - 1
    side = edges[:, -1:] - edges[:, :1]  # (R, 1)
    hats = (1.0 - (edges[:, :, None] - pixels[:, None].to(edges.dtype)).abs()).clamp(min=0.0)
    hats = hats * (pixels < size[:, None])[:, None].to(edges.dtype)
    gain_low = -(hats[:, :-1] * upstream).sum(dim=2) * bins / side  # (R, bins)
    gain_high = (hats[:, 1:] * upstream).sum(dim=2) * bins / side
    loss = (weights * upstream).sum(dim=2).sum(dim=1, keepdim=True) / side  # (R, 1)
    steps = torch.arange(bins + 1, dtype=edges.dtype, device=edges.device) / bins
    low, high = steps[:-1], steps[1:]
    of_last = (gain_low * low + gain_high * high).sum(dim=1, keepdim=True) - loss
    of_first = (gain_low * (1 - low) + gain_high * (1 - high)).sum(dim=1, keepdim=True) + loss
    return torch.cat([of_first, of_last], dim=1)


def _pixels(edges: Tensor, size: Tensor) -> Tensor:
    """(R, X): the pixels that bins with these edges touch, as many as the longest window has."""
    first, last = _window(edges, size)
    return first[:, None] + torch.arange(int((last - first).max()) + 1, device=first.device)


def _lookup(pixels: Tensor, origin: Tensor, sizes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Windows (R, Y, X, C) of the table; beyond the map stand pixels of its edge."""
    width, height = sizes[:, :1], sizes[:, 1:]
    begin = torch.minimum(rows, height - 1) * width + origin[:, None]  # (R, Y)
    index = begin[:, :, None] + torch.minimum(columns, width - 1)[:, None]
    found = pixels.index_select(0, index.reshape(-1))
    return found.view(-1, rows.shape[1], columns.shape[1], pixels.shape[1])


def _rois_at_once(sizes: Tensor, x_edges: Tensor, y_edges: Tensor, budget: int) -> int:
    """As many RoIs as have no more than `budget` pixels in their windows, but one at least."""
    x_first, x_last = _window(x_edges, sizes[:, 0])
    y_first, y_last = _window(y_edges, sizes[:, 1])
    area = ((x_last - x_first).max() + 1) * ((y_last - y_first).max() + 1)
    return max(1, budget // int(area))


def _pool(
    pixels: Tensor, origin: Tensor, sizes: Tensor, x_edges: Tensor, y_edges: Tensor, budget: int
) -> Tensor:
    """(R, P, Q, C)"""
    channels = pixels.shape[1]
    rows, columns = y_edges.shape[1] - 1, x_edges.shape[1] - 1
    pooled = pixels.new_zeros([0, rows, columns, channels])
    count = origin.shape[0]
    if count > 0:
        step = _rois_at_once(sizes, x_edges, y_edges, budget)
        for i in range((count + step - 1) // step):
            begin, end = i * step, (i + 1) * step
            size, x_edge, y_edge = sizes[begin:end], x_edges[begin:end], y_edges[begin:end]
            x = _pixels(x_edge, size[:, 0])
            y = _pixels(y_edge, size[:, 1])
            window = _lookup(pixels, origin[begin:end], size, y, x)  # (R', Y, X, C)
            by_row = _weights(y_edge, y, size[:, 1]).to(pixels.dtype) @ window.flatten(2)
            by_row = by_row.view(-1, rows, x.shape[1], channels)
            x_weights = _weights(x_edge, x, size[:, 0]).to(pixels.dtype)
            part = x_weights[:, None] @ by_row
            pooled = torch.cat([pooled, part])
    return pooled


def _box_gradient(
    pixels: Tensor,
    origin: Tensor,
    sizes: Tensor,
    x_edges: Tensor,
    y_edges: Tensor,
    upstream: Tensor,
    budget: int,
) -> Tensor:
    """(R, 4), from an upstream (R, P, Q, C)."""
    channels = pixels.shape[1]
    rows = y_edges.shape[1] - 1
    gradient = x_edges.new_zeros([0, 4])
    count = origin.shape[0]
    if count > 0:
        step = _rois_at_once(sizes, x_edges, y_edges, budget)
        for i in range((count + step - 1) // step):
            begin, end = i * step, (i + 1) * step
            size, x_edge, y_edge = sizes[begin:end], x_edges[begin:end], y_edges[begin:end]
            x = _pixels(x_edge, size[:, 0])
            y = _pixels(y_edge, size[:, 1])
            window = _lookup(pixels, origin[begin:end], size, y, x)  # (R', Y, X, C)
            part = upstream[begin:end]
            # What would be its gradient in Wy F, (R', P, X, C), is what `by_row` meets.
            x_weights = _weights(x_edge, x, size[:, 0]).to(pixels.dtype)
            by_column = x_weights.transpose(1, 2)[:, None] @ part
            of_y = by_column.flatten(2) @ window.flatten(2).transpose(1, 2)  # (R', P, Y)
            by_row = _weights(y_edge, y, size[:, 1]).to(pixels.dtype) @ window.flatten(2)
            by_row = by_row.view(-1, rows, x.shape[1], channels)
            of_x = (part @ by_row.transpose(2, 3)).sum(dim=1)  # (R', Q, X)
            x_sides = _edge_gradient(x_edge, x, size[:, 0], of_x.to(x_edge.dtype))
            y_sides = _edge_gradient(y_edge, y, size[:, 1], of_y.to(y_edge.dtype))
            sides = torch.stack([x_sides, y_sides], dim=2).flatten(1)  # x1, y1, x2, y2
            gradient = torch.cat([gradient, sides])
    return gradient
