"""Anchors as torchvision, mmdetection and a port of RefineDet have them.

Their order is Detectron2's everywhere: in a cell by size, then by ratio; a converted checkpoint has
its channels in that order.

Shape letters: A anchors a cell, R anchors of a level or of all. Boxes are XYXY in pixels of the
network input.
"""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator
from detectron2.structures import Boxes
from torch import Tensor


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(DefaultAnchorGenerator):
    """Anchors whose corners around their centre are whole pixels, torchvision's.

    The centres lie where torchvision puts them: a level has as many cells as fit, so that a level
    of 13 rows has a stride of 800 // 13 = 61 px in an image of 800 rows, and not of 64.
    """

    def generate_cell_anchors(self, sizes, aspect_ratios) -> Tensor:
        """Sizes in px and ratios (height / width) of a level -> (A, 4) around (0, 0)."""
        return super().generate_cell_anchors(sizes, aspect_ratios).round()

    def forward(self, features: list[Tensor]) -> list[Boxes]:
        """L features (N, C, H, W) -> L Boxes of R = HWA anchors. The stride of the first feature
        divides the padded image, as that of p3 does."""
        height, width = (side * self.strides[0] for side in features[0].shape[-2:])
        anchors = []
        for feature, cell in zip(features, self.cell_anchors):
            rows, columns = feature.shape[-2:]
            y = (torch.arange(rows, device=cell.device) + self.offset) * (height // rows)
            x = (torch.arange(columns, device=cell.device) + self.offset) * (width // columns)
            y, x = torch.meshgrid(y, x, indexing="ij")
            centers = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            anchors.append(Boxes((centers + cell).reshape(-1, 4)))
        return anchors


@ANCHOR_GENERATOR_REGISTRY.register()
class LegacyAnchorGenerator(DefaultAnchorGenerator):
    """Anchors of mmdetection 1, where a box ends with its last pixel and is x2 - x1 + 1 wide.

    Here a box ends one pixel later, as everywhere in Detectron2, so that widths, deltas, IoUs and
    NMS are those of mmdetection 1, and ground truth and detections COCO's. A cell anchor is the box
    of its size around the middle of the first cell of `stride` pixels, its first and last pixel
    rounded.
    """

    def _calculate_anchors(self, sizes, aspect_ratios):
        cells = super()._calculate_anchors(sizes, aspect_ratios)
        for cell, stride in zip(cells, self.strides):
            first = cell[:, :2] + stride / 2
            last = cell[:, 2:] + stride / 2 - 1
            cell.copy_(torch.cat([first.round(), last.round() + 1], dim=1))
        return cells


@ANCHOR_GENERATOR_REGISTRY.register()
class ClippedAnchorGenerator(DefaultAnchorGenerator):
    """Anchors that are no wider and no higher than the image, luuuyi/RefineDet.PyTorch's. Of
    RefineDet320 that are 50 of 6375, of 362 px without it."""

    @configurable
    def __init__(self, *, longest_side: float, **kwargs):
        """
        Args:
            longest_side: of an anchor, in pixels: INPUT.SQUARE_SIZE.
            kwargs: those of DefaultAnchorGenerator.
        """
        super().__init__(**kwargs)
        for cell in self.cell_anchors:  # around (0, 0)
            cell.clamp_(-longest_side / 2, longest_side / 2)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {**super().from_config(cfg, input_shape), "longest_side": cfg.INPUT.SQUARE_SIZE}


def cell_corners(anchors: Boxes, count: int) -> Tensor:
    """The top left corner of the cell of each anchor of a level, `count` a cell: (R, 2) x and y in
    whole pixels."""
    corners = anchors.tensor.view(-1, count, 4)[..., :2]
    return (corners - corners[:1]).round().view(-1, 2)
