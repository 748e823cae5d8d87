"""prroi_pool against a sum over pixels in float64, with RoIs of all sorts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from iou_d2.layers.prroi_pool import prroi_pool

from .judge import READ, REFUSED, Surface, Try, require
from .tensors import DTYPES, boxes, laid_out


def make(prepared: Any, one: Try) -> dict:
    rng = one.rng
    n, channels, rois = rng.randint(0, 2), rng.randint(1, 3), rng.randint(0, 4)
    height, width = rng.choice((0, 1, 2, 5, 7)), rng.randint(1, 7)
    features = torch.from_numpy(
        np.random.default_rng(rng.getrandbits(32)).normal(size=(n, channels, height, width))
    ).to(rng.choice(DTYPES))
    if rng.random() < 0.3:
        features = features.contiguous(memory_format=torch.channels_last)
    index = torch.tensor([float(rng.randrange(max(n, 1))) for _ in range(rois)]).double()
    if rois and rng.random() < 0.1:
        index[rng.randrange(rois)] = rng.choice((-1, n, 0.5, 1e9, math.nan, math.inf, 2.0**40))
    table = torch.cat([index[:, None], boxes(rng, rois, wild=0.4)], dim=1)
    table = table.to(rng.choice((torch.float32, torch.float64)))
    if rng.random() < 0.05:
        table = rng.choice((table[:, :4], table.long(), table[None], table.half(), table.int()))
    size = rng.choice((1, 2, 3, (1, 3), (2, 1), 7, 0, -1) if rng.random() < 0.1 else (1, 2, (3, 1)))
    scale = rng.choice((1.0, 0.5, 0.125, 1 / 64, 2.0))
    if rng.random() < 0.02:
        scale = rng.choice((0.0, -1.0, math.nan, math.inf, 1e30))
    return {
        "features": laid_out(rng, features),
        "rois": laid_out(rng, table),
        "output_size": size,
        "spatial_scale": scale,
        "aligned": rng.random() < 0.5,
    }


def judge(case: dict) -> str:
    features, rois = case["features"].requires_grad_(), case["rois"]
    if rois.is_floating_point():
        rois.requires_grad_()
    try:
        pooled = prroi_pool(**case)
    except (ValueError, TypeError, IndexError) as error:
        require(not _is_valid(case), f"valid RoIs are refused: {error}")
        return REFUSED
    require(_is_valid(case), "RoIs with a wrong shape, dtype or batch index are pooled")
    expected = _expected(case)
    require(pooled.shape == expected.shape, f"the shape is {tuple(pooled.shape)}")
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(features.dtype, 2e-4)
    off = np.abs(pooled.detach().double().numpy() - expected).max(initial=0)
    require(bool(off < tolerance * 4), f"the values are off by {off}")
    if pooled.requires_grad:
        gradients = torch.autograd.grad(pooled.sum(), (features, rois))
        for gradient in gradients:
            require(bool(gradient.isfinite().all()), "a gradient is not finite")
    return READ


def _is_valid(case: dict) -> bool:
    rois, size = case["rois"].detach(), case["output_size"]
    sizes = size if isinstance(size, tuple) else (size,)
    if rois.dim() != 2 or rois.shape[1] != 5 or rois.dtype not in (torch.float32, torch.float64):
        return False
    if 0 in case["features"].shape[2:] or not 0 < case["spatial_scale"] < math.inf:
        return False
    index = rois[:, 0].trunc()  # as documented: a fraction is cut off
    known = (index >= 0) & (index < case["features"].shape[0])
    return min(sizes) >= 1 and bool(known.all())


def _expected(case: dict) -> np.ndarray:
    features = case["features"].detach().double().numpy()
    size = case["output_size"]
    height, width = size if isinstance(size, tuple) else (size, size)
    rois = case["rois"].detach().double().numpy()
    pooled = np.zeros((len(rois), features.shape[1], height, width))
    for row, (index, *box) in enumerate(rois):
        x1, y1, x2, y2 = np.array(box) * case["spatial_scale"] - (0.5 if case["aligned"] else 0)
        if not (np.isfinite([x1, y1, x2, y2]).all() and x2 - x1 > 1e-9 and y2 - y1 > 1e-9):
            continue
        along_x = _weights(x1, x2, width, features.shape[3])
        along_y = _weights(y1, y2, height, features.shape[2])
        pooled[row] = along_y @ features[int(index)] @ along_x.T
    return pooled


def _weights(start: float, end: float, bins: int, pixels: int) -> np.ndarray:
    """(bins, pixels): the mean over each bin of the hat of each pixel."""
    edges = start + (end - start) * np.arange(bins + 1) / bins
    distance = np.clip(edges[:, None] - np.arange(pixels), -1, 1)
    integral = np.where(distance < 0, (1 + distance) ** 2 / 2, 1 - (1 - distance) ** 2 / 2)
    return np.diff(integral, axis=0) / ((end - start) / bins)


SURFACES = {
    "rois": Surface(
        "rois",
        "`prroi_pool`: values against a sum in float64, gradients finite",
        tries=25_000,
        prepare=lambda folder: None,
        make=make,
        judge=judge,
        chunks=2,
    )
}
