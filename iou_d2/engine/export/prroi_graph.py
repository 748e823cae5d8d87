"""Precise RoI pooling over the levels of a pyramid and its derivatives in the boxes, as tensor
operations that ONNX and TorchScript hold, with any number of images, sizes and boxes.

Arithmetic as in layers/prroi_pool.py (arXiv 1807.11590, eq. 2-4): out = Wy F Wx^T, so that
d out / dx1 = Wy F (d Wx / dx1)^T. Here F is but the window of the map that a box touches, looked up
in a table of all pixels of all levels, a few boxes of like windows at a time. Both axes go through
the same operations at once: a graph has them at each step. Shape letters: N images, C channels,
H x W feature map, L levels, R RoIs, P x P bins, S pixels of all levels and images, X pixels of the
longest side of a window, Y x X those of the largest of some windows. Boxes are XYXY in pixels of
the network input.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.structures import Boxes
from torch import Tensor

from iou_d2.detectors.pooler import PrRoIPooler
from iou_d2.errors import InputError

from .prroi_weights import edges_of, slopes_of, weights_of

# Pixels of the windows that are looked up at a time, at most: 8 MiB for 256 channels. Most are
# less: as many are looked up with the largest windows as with the smallest.
PIXELS_AT_ONCE = 2**13


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


def bins_of(pooler: PrRoIPooler) -> int:
    """P. Raises InputError where the bins are no square, whose axes a graph takes together."""
    rows, columns = pooler.output_size
    if rows != columns:
        raise InputError(
            f"A pooler of {rows} x {columns} bins cannot be exported: as many columns are needed."
        )
    return rows


class RoIs(NamedTuple):
    """RoIs as the table sees them, those of like windows beside each other. Where there are two
    axes, the first is x."""

    order: Tensor  # (R,) int64, which of the boxes each is
    counts: Tensor  # (2, R) int64, columns and rows of its window, at least 1
    columns: Tensor  # (R, X) int64, of the window
    rows: Tensor  # (R, X) int64, where each row of its map begins in the table
    places: Tensor  # (2, R, X) float64, coordinates of columns and rows; infinity behind the last
    edges: Tensor  # (2, R, P + 1) float64, of its bins in feature pixels
    valid: Tensor  # (R,) whether it has an area, is finite and of one of the images
    scales: Tensor  # (R,) float64, feature pixels an input pixel


def place(
    table: FeatureTable,
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    bins: int,
    aligned: bool = True,
) -> RoIs:
    """RoIs of boxes (R, 4) with their image and level, both (R,) int64, that `pool` takes.

    A box of an image that there is not, such as -1, is pooled to 0.
    """
    scales = table.scales[level]
    # In float64: float32 leaves no digits of sides of a thousandth of a pixel.
    starts, ends = (boxes.double().T * scales - (0.5 if aligned else 0.0)).view(2, 2, -1)
    sides = ends - starts  # NaN or infinite where an edge is
    valid = (sides > 1e-9) & (sides < torch.inf)
    valid = valid[0] & valid[1] & (image >= 0) & (image < table.images)
    starts = torch.where(valid, starts, 0.0)
    ends = torch.where(valid, ends, 1.0)
    image = torch.where(valid, image, 0)
    sizes = torch.stack([table.widths[level], table.heights[level]])
    origin = table.first[level] + image * sizes[0] * sizes[1]
    first = _inside(starts.floor(), sizes)
    counts = _inside(ends.ceil(), sizes) - first + 1
    order = _by_window(counts)
    counts, sizes = counts[:, order], sizes[:, order]
    numbers, places = _scripted(_pixels)(first[:, order], counts, sizes)
    return RoIs(
        order,
        counts,
        numbers[0],
        origin[order][:, None] + numbers[1] * sizes[0][:, None],
        places,
        edges_of(starts[:, order], ends[:, order], bins),
        valid[order],
        scales[order],
    )


class Slopes(NamedTuple):
    """Derivatives of the values of R RoIs in their order, and of some more, 0 where one is not
    valid."""

    in_x: Tensor  # (R, P, 2P, C), for each row of bins in x1 of the box, then in x2
    in_y: Tensor  # (R, 2P, P, C), in y1, then in y2


def pool(table: FeatureTable, rois: RoIs) -> Tensor:
    """(R, C, P, P): what `prroi_pool` gives for each box. No RoIs: an empty result."""
    where = rois.counts, rois.rows, rois.columns
    weights = _weights_of_rois(rois).to(table.pixels.dtype)
    pooled = _scripted(_pool)(table.pixels, *where, weights, PIXELS_AT_ONCE)
    return _by_box(rois, pooled).permute(0, 3, 1, 2)


def pool_with_slopes(table: FeatureTable, rois: RoIs) -> tuple[Tensor, Slopes]:
    """What `pool` gives, and what `box_gradient` takes."""
    dtype = table.pixels.dtype
    where = rois.counts, rois.rows, rois.columns
    weights = _weights_of_rois(rois)
    slopes = slopes_of(rois.edges, rois.places, rois.scales, weights) * rois.valid[:, None, None]
    found = _scripted(_pool_with_slopes)(
        table.pixels, *where, weights.to(dtype), slopes.to(dtype), PIXELS_AT_ONCE
    )
    return _by_box(rois, found[0]).permute(0, 3, 1, 2), Slopes(*found[1:])


def box_gradient(rois: RoIs, slopes: Slopes, upstream: Tensor) -> Tensor:
    """Gradient (R, 4) in the boxes of a scalar whose gradient in the pooled values is `upstream`
    (R, C, P, P)."""
    count = rois.order.shape[0]
    upstream = upstream.permute(0, 2, 3, 1)[rois.order]
    rows, columns, channels = upstream.shape[1:]
    in_x = slopes.in_x[:count].reshape(-1, rows, 2, columns * channels)
    in_x = (in_x @ upstream.reshape(-1, rows, columns * channels, 1)).sum(dim=1)
    in_y = slopes.in_y[:count].reshape(-1, 2, rows * columns * channels)
    in_y = in_y @ upstream.reshape(-1, rows * columns * channels, 1)
    return _by_box(rois, torch.cat([in_x, in_y], dim=2).flatten(1))


def _by_box(rois: RoIs, values: Tensor) -> Tensor:
    """Values of RoIs (R or more, ...) in the order of their R boxes."""
    return values[rois.order.argsort()]


def _weights_of_rois(rois: RoIs) -> Tensor:
    """Wx and Wy (2, R, P, X), 0 where a RoI is not valid."""
    return weights_of(rois.edges, rois.places) * rois.valid[:, None, None]


def _inside(coordinates: Tensor, sizes: Tensor) -> Tensor:
    """(2, R) int64: the pixels nearest to whole coordinates of maps of these sizes."""
    # Clipped before they become whole numbers, which might not hold them.
    limits = (sizes - 1).to(coordinates.dtype)
    return torch.minimum(coordinates.clamp(min=0.0), limits).to(torch.int64)


def _by_window(counts: Tensor) -> Tensor:
    """An order (R,) in which windows beside each other are about as wide and as high, the widest
    first: those that are looked up together are filled up to one size."""
    widths = counts[0] + 3
    return ((widths - widths % 4) * 2**29 + counts[1]).sort(descending=True).indices


def _scripted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as a graph can hold it: a tracer would unroll its loops and make constants of the
    sizes of windows, and TorchScript does neither."""
    if not torch.jit.is_tracing():
        return function
    with warnings.catch_warnings():  # of its own age
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)


def _pixels(first: Tensor, counts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Of windows (2, R) of maps of these sizes the pixels along each axis (2, R, X), X those of the
    longest side, and their coordinates: where there are no more, the last one, infinitely far
    away."""
    longest = int(torch.cat([counts, counts.new_ones([2, 1])], dim=1).max())
    numbers = first[..., None] + torch.arange(longest, device=first.device)
    last = (sizes - 1)[..., None]
    far = torch.full_like(numbers, torch.inf, dtype=torch.float64)
    places = torch.where(numbers > last, far, numbers.to(torch.float64))
    return torch.minimum(numbers, last), places


def _rois_at_once(counts: Tensor, budget: int) -> int:
    """As many RoIs as have no more than `budget` pixels in their windows, but one at least; fewer
    where as many rounds do, for the last one is filled up."""
    largest = torch.cat([counts, counts.new_ones([2, 1])], dim=1).max(dim=1)[0]
    most = max(1, budget // int(largest[0] * largest[1]))
    count = counts.shape[1]
    rounds = max(1, (count + most - 1) // most)
    return max(1, (count + rounds - 1) // rounds)


def _windows(pixels: Tensor, counts: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(R, Y, XC): the windows of some RoIs, as large as the largest of them."""
    largest = counts.max(dim=1)[0]
    width, height = int(largest[0]), int(largest[1])
    index = rows[:, :height, None] + columns[:, None, :width]
    return pixels.index_select(0, index.reshape(-1)).view(-1, height, width * pixels.shape[1])


def _by_row(weights: Tensor, windows: Tensor, channels: int) -> Tensor:
    """Wy F, (R, bins, X, C), of weights (R, bins, Y) and windows (R, Y, XC)."""
    height = windows.shape[1]
    by_row = weights[:, :, :height] @ windows
    return by_row.view(-1, weights.shape[1], windows.shape[2] // channels, channels)


def _by_column(by_row: Tensor, weights: Tensor) -> Tensor:
    """Wy F Wx^T, (R, P, bins, C), of (R, P, X, C) and weights (R, bins, X)."""
    return weights[:, None, :, : by_row.shape[2]] @ by_row


def _pool(
    pixels: Tensor,
    counts: Tensor,
    rows: Tensor,
    columns: Tensor,
    weights: Tensor,
    budget: int,
) -> Tensor:
    """(R or more, P, P, C): the last RoI again and again behind the R, for OpenVINO takes what the
    rounds of a loop give for equally long."""
    count, bins, channels = rows.shape[0], weights.shape[2], pixels.shape[1]
    parts = [pixels.new_zeros([0, bins, bins, channels])]
    step = _rois_at_once(counts, budget)
    for i in range((count + step - 1) // step):
        part = torch.arange(i * step, (i + 1) * step, device=counts.device).clamp(max=count - 1)
        windows = _windows(pixels, counts[:, part], rows[part], columns[part])
        parts.append(_by_column(_by_row(weights[1, part], windows, channels), weights[0, part]))
    return torch.cat(parts)


def _pool_with_slopes(
    pixels: Tensor,
    counts: Tensor,
    rows: Tensor,
    columns: Tensor,
    weights: Tensor,
    slopes: Tensor,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_pool` gives, and its derivatives (R or more, P, 2P, C) and (R or more, 2P, P, C), of
    slopes (2, R, 2P, X)."""
    count, bins, channels = rows.shape[0], weights.shape[2], pixels.shape[1]
    pooled = [pixels.new_zeros([0, bins, bins, channels])]
    in_x = [pixels.new_zeros([0, bins, 2 * bins, channels])]
    in_y = [pixels.new_zeros([0, 2 * bins, bins, channels])]
    step = _rois_at_once(counts, budget)
    for i in range((count + step - 1) // step):
        part = torch.arange(i * step, (i + 1) * step, device=counts.device).clamp(max=count - 1)
        windows = _windows(pixels, counts[:, part], rows[part], columns[part])
        by_row, by_column = _by_row(weights[1, part], windows, channels), weights[0, part]
        pooled.append(_by_column(by_row, by_column))
        in_x.append(_by_column(by_row, slopes[0, part]))
        in_y.append(_by_column(_by_row(slopes[1, part], windows, channels), by_column))
    return torch.cat(pooled), torch.cat(in_x), torch.cat(in_y)
