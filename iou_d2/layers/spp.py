"""Max pooling over RoIs and over spatial pyramids of bins (SPP-net, arXiv 1406.4729), and the block
of max pools that YOLOv3-SPP puts behind its backbone.

Shape letters: N images, C channels, H x W feature map, R RoIs, P bins a side, B bins of all levels
of a spatial pyramid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn
from torchvision.ops import RoIPool

# No map reaches so far, and integers of 32 bits do.
_FAR = 1e8


class RoIMaxPool(RoIPool):
    """torchvision's RoIPool (Fast R-CNN, arXiv 1504.08083, section 2.1), for boxes of any value and
    maps of any dtype.

    Corners go to the nearest feature pixel, and both of these count as inside. Bin k of P over a
    side of L pixels is [floor(k L / P), ceil((k + 1) L / P)), as in `adaptive_max_pool2d`, so that
    bins may share pixels. torchvision computes these edges in float32: of 7 bins over 57, 114, 121
    and more pixels the last takes one pixel more; up to 6 bins are exact below 400 pixels.
    """

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """The maximum of each bin; differentiable in the features alone.

        Args:
            features: (N, C, H, W), of any dtype.
            rois: (R, 5), batch index, then x1, y1, x2, y2 in pixels of the network input.

        Returns:
            (R, C, P, P) of the features' dtype. Bins outside the map are 0, and so are RoIs with
            NaN or infinity. A RoI without area, or an inverted one, is the pixel of its first
            corner. No RoIs: an empty result.
        """
        dtype = torch.promote_types(features.dtype, torch.float32)
        finite = rois.isfinite().all(dim=1, keepdim=True)
        rois = torch.where(finite, rois.clamp(-_FAR, _FAR), -_FAR)
        rois = torch.cat([rois[:, :1].clamp(min=0), rois[:, 1:]], dim=1).to(dtype)
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(dtype), rois).to(features.dtype)


class SpatialPyramidPool(nn.Module):
    """Bins of several sizes over each RoI: "levels" (4, 2, 1) are 16 + 4 + 1 = 21 bins, and (6, 3,
    2, 1) are the 50 of SPP-net's detector (arXiv 1406.4729, section 4.1).

    SPP-net pools the maximum, a :class:`RoIMaxPool` a level. Another layer makes it something that
    nobody published, such as the means of a PrRoIPool.
    """

    def __init__(self, levels: Sequence[int], layer: Callable[[int], nn.Module]):
        """
        Args:
            levels: bins a side, P of each level.
            layer: P -> (N, C, H, W), (R, 5) -> (R, C, P, P).
        """
        super().__init__()
        self.grids = nn.ModuleList(layer(side) for side in levels)

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """(N, C, H, W), (R, 5) -> (R, C, B, 1): level after level, rows of a level first."""
        pooled = [grid(features, rois).flatten(2) for grid in self.grids]  # (R, C, P * P)
        return torch.cat(pooled, dim=2)[..., None]


class SPPBlock(nn.Module):
    """1x1 convolution to half of the channels -> the map beside its max pools of stride 1 -> 1x1
    convolution back, as between the backbone and the neck of YOLOv3-SPP.

    It takes no RoIs and changes no shape. darknet has leaky ReLUs behind the convolutions, here
    they are ReLUs, as in a ResNet.
    """

    def __init__(self, channels: int, kernels: Sequence[int] = (5, 9, 13), norm: str = ""):
        """
        Args:
            channels: C, at least 2.
            kernels: sides of the pools, odd.
            norm: of the convolutions, as in Detectron2's `get_norm`.
        """
        super().__init__()
        self.kernels = tuple(kernels)
        half = channels // 2
        self.reduce = _pointwise(channels, half, norm)
        self.merge = _pointwise(half * (1 + len(self.kernels)), channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)"""
        x = self.reduce(x)
        pools = [F.max_pool2d(x, k, stride=1, padding=k // 2) for k in self.kernels]
        return self.merge(torch.cat([x, *pools], dim=1))


def _pointwise(channels: int, out_channels: int, norm: str) -> Conv2d:
    conv = Conv2d(
        *(channels, out_channels, 1),
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=F.relu,
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
