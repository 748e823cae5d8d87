"""The default boxes of SSD (arXiv 1512.02325).

Shape letters: L levels, A boxes of a cell of a level, R boxes of all levels. Boxes are XYXY in
pixels of the network input, where it does not say that they are centre and sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detectron2.modeling.anchor_generator import BufferList
from detectron2.structures import Boxes
from torch import Tensor, nn

from iou_d2.errors import InputError

from .dense import part_named


def default_sizes(
    image_size: int, levels: int, ratios: tuple[int, int, int], truncate: bool
) -> list[tuple[float, float]]:
    """The smaller and the larger size of the default boxes of each level, in pixels.

    The rule of SSD's code: the second to the last level divide the percents from min to max evenly,
    in whole percents, rounded down; the first level is an extra one. The larger size of a level is
    the smaller one of the next.

    Args:
        ratios: first, min and max: percents of `image_size`.
        truncate: cut sizes to whole pixels, as Caffe does.
    """
    lowest, low, high = ratios
    step = (high - low) // max(levels - 2, 1)
    percents = [lowest, *(low + index * step for index in range(levels))]
    sizes = [image_size * percent / 100 for percent in percents]
    if truncate:
        sizes = [float(int(size)) for size in sizes]
    return list(zip(sizes, sizes[1:]))


# (boxes as (..., 4) centre x, centre y, width, height; side of the image) -> the same.
Clip = Callable[[Tensor, float], Tensor]


def clip_nothing(boxes: Tensor, side: float) -> Tensor:
    return boxes


def clip_sides(boxes: Tensor, side: float) -> Tensor:
    """No box is wider or higher than the image, wherever it is (torchvision)."""
    return torch.cat([boxes[..., :2], boxes[..., 2:].clamp(max=side)], dim=-1)


def clip_centers_and_sides(boxes: Tensor, side: float) -> Tensor:
    """That, and centres lie in the image (amdegroot/ssd.pytorch, lufficc/SSD)."""
    return boxes.clamp(min=0, max=side)


def clip_corners(boxes: Tensor, side: float) -> Tensor:
    """What is outside of the image is cut off (Caffe's `clip`, which SSD does not use)."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    low, high = (center - half).clamp(0, side), (center + half).clamp(0, side)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


CLIPS: dict[str, Clip] = {
    "none": clip_nothing,
    "sides": clip_sides,
    "centers_and_sides": clip_centers_and_sides,
    "corners": clip_corners,
}


class DefaultBoxes(nn.Module):
    """The default boxes of all cells of all levels.

    Their order is that of Caffe's SSD: rows, columns, and in a cell a square of the smaller size,
    one of the geometric mean of both, and a box of the smaller size for each aspect ratio and its
    inverse.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[tuple[float, float]],
        aspect_ratios: Sequence[Sequence[float]],
        steps: Sequence[float],
        image_size: int,
        clip: Clip = clip_nothing,
    ):
        """
        Args:
            sizes: the smaller and the larger size of each level, in pixels.
            aspect_ratios: width / height of each level, without 1 and the inverses.
            steps: pixels from a cell to the next one of each level.
            image_size: side of the images for which `clip` cuts.
        """
        super().__init__()
        self.steps = list(steps)
        self.image_size = image_size
        self.clip = clip
        self.shapes = BufferList(map(_cell_shapes, sizes, aspect_ratios))

    @property
    def num_cell_boxes(self) -> list[int]:
        """Boxes of a cell of each level."""
        return [len(shapes) for shapes in self.shapes]

    def forward(self, features: Sequence[Tensor]) -> Boxes:
        """L features (N, C, H, W) -> the R boxes of an image."""
        levels = []
        for feature, step, shapes in zip(features, self.steps, self.shapes):
            height, width = feature.shape[-2:]
            x = (torch.arange(width, device=shapes.device) + 0.5) * step
            y = (torch.arange(height, device=shapes.device) + 0.5) * step
            centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 1, 2)
            count = len(shapes)
            boxes = torch.cat(
                [centers.expand(-1, count, 2), shapes.expand(centers.shape[0], count, 2)], dim=-1
            )
            levels.append(boxes.reshape(-1, 4))
        boxes = self.clip(torch.cat(levels), self.image_size)
        center, half = boxes[:, :2], boxes[:, 2:] / 2
        return Boxes(torch.cat([center - half, center + half], dim=1))


def _cell_shapes(sizes: tuple[float, float], aspect_ratios: Sequence[float]) -> Tensor:
    """Width and height of the boxes of a cell: (A, 2)."""
    small, large = sizes
    mean = (small * large) ** 0.5
    shapes = [(small, small), (mean, mean)]
    for ratio in aspect_ratios:
        long, short = small * ratio**0.5, small / ratio**0.5
        shapes += [(long, short), (short, long)]
    return torch.tensor(shapes)


def build_default_boxes(cfg, strides: Sequence[int]) -> DefaultBoxes:
    """The default boxes of MODEL.SSD for levels of `strides`.

    Raises InputError where a key is not for that many levels, or its values are none.
    """
    node, side, levels = cfg.MODEL.SSD, cfg.INPUT.SQUARE_SIZE, len(strides)
    for key in ("ASPECT_RATIOS", "STEPS"):
        value = node[key]
        if len(value) != levels and not (key == "STEPS" and not value):
            raise InputError(
                f"MODEL.SSD.{key} is for {len(value)} levels, but MODEL.RETINANET.IN_FEATURES has "
                f"{levels}."
            )
    ratios = (node.FIRST_RATIO, node.MIN_RATIO, node.MAX_RATIO)
    sizes = default_sizes(side, levels, ratios, node.TRUNCATE_SIZES)
    if min(min(pair) for pair in sizes) <= 0 or ratios[1] > ratios[2]:
        raise InputError(
            f"MODEL.SSD.FIRST_RATIO, MIN_RATIO and MAX_RATIO are {ratios} percent of "
            f"INPUT.SQUARE_SIZE {side}, which leaves boxes of the sizes {sizes}."
        )
    return DefaultBoxes(
        sizes=sizes,
        aspect_ratios=node.ASPECT_RATIOS,
        steps=node.STEPS or strides,
        image_size=side,
        clip=part_named(CLIPS, node.CLIP, "MODEL.SSD.CLIP"),
    )
