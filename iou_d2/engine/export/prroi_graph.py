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
    first: Tensor  # (R, 2) int64, x and y of the first pixel that the RoI touches
    counts: Tensor  # (R, 2) int64, how many it touches from there on, at least 1
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
    sizes = torch.stack([table.widths[level], table.heights[level]], dim=1)
    image = torch.where(valid, image, torch.zeros_like(image))
    first = _inside(boxes[:, :2].floor(), sizes)
    return RoIs(
        table.first[level] + image * sizes[:, 0] * sizes[:, 1],
        sizes,
        first,
        _inside(boxes[:, 2:].ceil(), sizes) - first + 1,
        _edges(boxes[:, 0], boxes[:, 2], output_size[1]),
        _edges(boxes[:, 1], boxes[:, 3], output_size[0]),
        valid,
    )


def pool(table: FeatureTable, rois: RoIs) -> Tensor:
    """(R, C, P, Q): what `prroi_pool` gives for each RoI. No RoIs: an empty result."""
    pooled = _scripted(_pool)(table.pixels, *rois[:-1], PIXELS_AT_ONCE).permute(0, 3, 1, 2)
    return torch.where(rois.valid[:, None, None, None], pooled, torch.zeros_like(pooled))


def box_gradient(table: FeatureTable, rois: RoIs, level: Tensor, upstream: Tensor) -> Tensor:
    """Gradient (R, 4) in the boxes of a scalar whose gradient in the pooled values is `upstream`
    (R, C, P, Q); `level` as given to `place`. 0 where a RoI is not valid."""
    upstream = upstream.permute(0, 2, 3, 1)
    gradient = _scripted(_box_gradient)(table.pixels, *rois[:-1], upstream, PIXELS_AT_ONCE)
    gradient = gradient * table.scales[level][:, None]
    gradient = torch.where(rois.valid[:, None], gradient, torch.zeros_like(gradient))
    return gradient.to(table.pixels.dtype)


def _inside(coordinates: Tensor, sizes: Tensor) -> Tensor:
    """(R, 2) int64: the pixels nearest to whole coordinates of maps of these sizes."""
    # Clipped before they become whole numbers, which might not hold them.
    limits = (sizes - 1).to(coordinates.dtype)
    return torch.minimum(coordinates.clamp(min=0.0), limits).to(torch.int64)


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


def _rois_at_once(counts: Tensor, budget: int) -> int:
    """As many RoIs as have no more than `budget` pixels in their windows, but one at least."""
    longest = torch.cat([counts, counts.new_ones([1, 2])]).max(dim=0)[0]
    return max(1, budget // int(longest[0] * longest[1]))


def _pixels(first: Tensor, counts: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels (R, X) of a side of windows, X the longest, and their coordinates: where there are
    no more, the last one, infinitely far away."""
    numbers = first[:, None] + torch.arange(int(counts.max()), device=first.device)
    last = (size - 1)[:, None]
    far = torch.full_like(numbers, torch.inf, dtype=torch.float64)
    place = torch.where(numbers > last, far, numbers.to(torch.float64))
    return torch.minimum(numbers, last), place


def _lookup(pixels: Tensor, origin: Tensor, width: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Windows (R, Y, X, C) of the table, of rows (R, Y) and columns (R, X)."""
    begin = rows * width[:, None] + origin[:, None]
    index = begin[:, :, None] + columns[:, None]
    found = pixels.index_select(0, index.reshape(-1))
    return found.view(-1, rows.shape[1], columns.shape[1], pixels.shape[1])


def _right_half(low: Tensor, high: Tensor) -> Tensor:
    """As in layers/prroi_pool.py."""
    low, high = low.clamp(0.0, 1.0), high.clamp(0.0, 1.0)
    return (high - low) * (1.0 - (low + high) / 2.0)


def _weights(edges: Tensor, place: Tensor) -> Tensor:
    """(R, bins, X): the integral of each pixel's hat over each bin, divided by the bin's length."""
    offsets = edges[:, :, None] - place[:, None]
    low, high = offsets[:, :-1], offsets[:, 1:]
    integral = _right_half(low, high) + _right_half(-high, -low)
    bins = edges.shape[1] - 1
    return integral * bins / (edges[:, -1:] - edges[:, :1])[:, :, None]


def _edge_gradient(edges: Tensor, place: Tensor, weights: Tensor, upstream: Tensor) -> Tensor:
    """Gradient (R, 2) in the first and the last edge of a scalar whose gradient in the weights is
    `upstream` (R, bins, X).

    An edge between them moves with both. What a weight gains from its own edges is the hat there,
    over the bin's length; what it loses from a longer bin is itself, over the length of all.
    """
    hats = (1.0 - (edges[:, :, None] - place[:, None]).abs()).clamp(min=0.0)
    low, high = (hats[:, :-1] * upstream).sum(dim=2), (hats[:, 1:] * upstream).sum(dim=2)
    lost = (weights * upstream).sum(dim=2).sum(dim=1, keepdim=True)  # (R, 1)
    bins = edges.shape[1] - 1
    numbers = torch.arange(bins, dtype=edges.dtype, device=edges.device)
    of_last = (high * (numbers + 1) - low * numbers).sum(dim=1, keepdim=True)
    of_both = bins * (high - low).sum(dim=1, keepdim=True)
    gradient = torch.cat([of_both - of_last + lost, of_last - lost], dim=1)
    return gradient / (edges[:, -1:] - edges[:, :1])


def _pool(
    pixels: Tensor,
    origin: Tensor,
    sizes: Tensor,
    first: Tensor,
    counts: Tensor,
    x_edges: Tensor,
    y_edges: Tensor,
    budget: int,
) -> Tensor:
    """(R, P, Q, C)"""
    channels = pixels.shape[1]
    rows, columns = y_edges.shape[1] - 1, x_edges.shape[1] - 1
    pooled = pixels.new_zeros([0, rows, columns, channels])
    step = _rois_at_once(counts, budget)
    for i in range((origin.shape[0] + step - 1) // step):
        part = torch.arange(i * step, min((i + 1) * step, origin.shape[0]), device=origin.device)
        size, begin, count = sizes[part], first[part], counts[part]
        x, x_place = _pixels(begin[:, 0], count[:, 0], size[:, 0])
        y, y_place = _pixels(begin[:, 1], count[:, 1], size[:, 1])
        x_weights = _weights(x_edges[part], x_place).to(pixels.dtype)
        y_weights = _weights(y_edges[part], y_place).to(pixels.dtype)
        window = _lookup(pixels, origin[part], size[:, 0], y, x)
        by_row = (y_weights @ window.flatten(2)).view(-1, rows, x.shape[1], channels)
        pooled = torch.cat([pooled, x_weights[:, None] @ by_row])
    return pooled


def _box_gradient(
    pixels: Tensor,
    origin: Tensor,
    sizes: Tensor,
    first: Tensor,
    counts: Tensor,
    x_edges: Tensor,
    y_edges: Tensor,
    upstream: Tensor,
    budget: int,
) -> Tensor:
    """(R, 4), from an upstream (R, P, Q, C)."""
    channels, rows = pixels.shape[1], y_edges.shape[1] - 1
    gradient = x_edges.new_zeros([0, 4])
    step = _rois_at_once(counts, budget)
    for i in range((origin.shape[0] + step - 1) // step):
        part = torch.arange(i * step, min((i + 1) * step, origin.shape[0]), device=origin.device)
        size, begin, count = sizes[part], first[part], counts[part]
        x, x_place = _pixels(begin[:, 0], count[:, 0], size[:, 0])
        y, y_place = _pixels(begin[:, 1], count[:, 1], size[:, 1])
        x_edge, y_edge, above = x_edges[part], y_edges[part], upstream[part]
        x_weights, y_weights = _weights(x_edge, x_place), _weights(y_edge, y_place)
        window = _lookup(pixels, origin[part], size[:, 0], y, x).flatten(2)
        by_row = y_weights.to(pixels.dtype) @ window
        by_row = by_row.view(-1, rows, x.shape[1], channels)
        of_x = (above @ by_row.transpose(2, 3)).sum(dim=1)  # (R, Q, X), gradient in Wx
        # The gradient in Wy F, (R, P, X, C), which meets F in that in Wy.
        by_column = x_weights.transpose(1, 2)[:, None].to(pixels.dtype) @ above
        of_y = by_column.flatten(2) @ window.transpose(1, 2)  # (R, P, Y)
        x_sides = _edge_gradient(x_edge, x_place, x_weights, of_x.to(x_edge.dtype))
        y_sides = _edge_gradient(y_edge, y_place, y_weights, of_y.to(y_edge.dtype))
        sides = torch.stack([x_sides, y_sides], dim=2).flatten(1)  # x1, y1, x2, y2
        gradient = torch.cat([gradient, sides])
    return gradient
