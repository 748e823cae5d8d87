"""PrRoI pooling as a float64 closed form in NumPy, and inputs for it."""

import math

import numpy as np
import torch

LAYOUTS = ("contiguous", "channels_last", "strided")


def antiderivative(t):
    """Integral of max(0, 1 - |s|) from minus infinity to t."""
    if t <= -1:
        return 0.0
    if t <= 0:
        return (t + 1) ** 2 / 2
    return 1 - (1 - t) ** 2 / 2 if t < 1 else 1.0


def oracle(features, rois, size, scale=1.0, aligned=False):
    """Eq. 3 of the paper, one RoI, bin and pixel at a time, in float64."""
    features, rois = np.asarray(features, np.float64), np.asarray(rois, np.float64)
    out = np.zeros((len(rois), features.shape[1], *size))
    for r, (n, *box) in enumerate(rois):
        x1, y1, x2, y2 = (c * scale - 0.5 * aligned for c in box)
        if not (np.isfinite(box).all() and x2 > x1 and y2 > y1):
            continue
        weights = []
        for start, end, bins, pixels in (
            (y1, y2, size[0], features.shape[2]),
            (x1, x2, size[1], features.shape[3]),
        ):
            edges = [start + (end - start) * k / bins for k in range(bins + 1)]
            table = np.array(
                [[antiderivative(e - i) for i in range(pixels)] for e in edges], np.float64
            )
            weights.append((table[1:] - table[:-1]) / ((end - start) / bins))
        out[r] = weights[0] @ features[int(n)] @ weights[1].T
    return out


def make_features(shape, layout, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    if layout == "strided":
        wide = torch.randn(n, c + 2, h, 2 * w, dtype=dtype, generator=generator)
        return wide[:, 1:-1, :, ::2]
    features = torch.randn(shape, dtype=dtype, generator=generator)
    if layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)
    return features


def make_rois(count, images, height, width, sides, seed=0, dtype=torch.float64):
    """RoIs with sides log-uniform between two numbers, inside, across and outside the map's
    border."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (math.log(s) for s in sides)
    side = torch.exp(low + torch.rand(count, 2, generator=generator) * (high - low))
    center = torch.rand(count, 2, generator=generator) * 1.4 - 0.2
    center = center * torch.tensor([width, height])
    image = torch.randint(images, (count, 1), generator=generator)
    return torch.cat([image, center - side / 2, center + side / 2], 1).to(dtype)


def gradients(op, features, rois, weight, *args):
    features = features.detach().requires_grad_()
    rois = rois.detach().requires_grad_()
    return torch.autograd.grad((op(features, rois, *args) * weight).sum(), (features, rois))
