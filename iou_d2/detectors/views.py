"""The views of an image that test-time augmentation looks at: resized and mirrored.

Boxes are XYXY in pixels of a view or, where it says so, of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, Instances
from torch import Tensor

from iou_d2.errors import InputError
from iou_d2.resize import ResizeShortestEdge


@dataclass(frozen=True)
class View:
    """One view of an image.

    Args:
        image: (3, h, w), with the values of the image.
        image_size: (height, width) of the image.
        is_mirrored: left and right are exchanged.
        box_sizes: of the boxes that are kept: the longer side over the first, the shorter one
            under the second, both in pixels of the image; None keeps all.
    """

    image: Tensor
    image_size: tuple[int, int]
    is_mirrored: bool = False
    box_sizes: tuple[float, float] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return tuple(self.image.shape[-2:])

    def boxes_in(self, other: View, boxes: Tensor) -> Tensor:
        """Boxes (R, 4) of this view -> the same ones in another view of the image. They are moved
        in float64 and rounded once; a view's own boxes come back to the last bit."""
        x1, y1, x2, y2 = boxes.double().unbind(dim=1)
        (height, width), (new_height, new_width) = self.size, other.size
        if self.is_mirrored != other.is_mirrored:
            x1, x2 = width - x2, width - x1
        x, y = new_width / width, new_height / height
        return torch.stack([x1 * x, y1 * y, x2 * x, y2 * y], dim=1).to(boxes)

    def instances_in(self, other: View, instances: Instances) -> Instances:
        """`instances` of this view with their `pred_boxes` in another one."""
        boxes = self.boxes_in(other, instances.pred_boxes.tensor)
        return Instances(other.size, **{**instances.get_fields(), "pred_boxes": Boxes(boxes)})

    def within_sizes(self, instances: Instances) -> Instances:
        """Those of `instances`, in pixels of whichever view, that `box_sizes` keeps of this one."""
        if self.box_sizes is None:
            return instances
        longest, shortest = self.box_sizes
        scale = [of_image / side for of_image, side in zip(self.image_size, instances.image_size)]
        boxes = instances.pred_boxes.tensor
        sides = (boxes[:, 2:] - boxes[:, :2]) * boxes.new_tensor(scale[::-1])
        kept = (sides.amax(dim=1) > longest) & (sides.amin(dim=1) < shortest)
        return instances[kept]


@dataclass(frozen=True)
class ViewMaker:
    """Makes the views of an image: each size, and then its mirror image.

    Args:
        resizes: what makes the sizes.
        mirrors: also make the mirror images.
        box_sizes: of each size, see View; None for no limit.
        plain: the resize of test images without augmentation.
    """

    resizes: Sequence[T.Augmentation]
    mirrors: bool
    box_sizes: Sequence[tuple[float, float] | None]
    plain: T.Augmentation

    def __call__(self, image: Tensor) -> tuple[list[View], View]:
        """An image (3, H, W) -> its views, and the one of these that has, of those that are not
        mirrored, the area nearest to that of the network input without augmentation."""
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        size = pixels.shape[:2]
        views = []
        for resize, limits in zip(self.resizes, self.box_sizes):
            resized = resize.get_transform(pixels).apply_image(pixels)
            for mirrored in (False, True)[: 1 + self.mirrors]:
                view = resized[:, ::-1] if mirrored else resized
                view = torch.from_numpy(view.transpose(2, 0, 1).copy())
                views.append(View(view, size, mirrored, limits))
        width, height = self.plain.get_transform(pixels).apply_coords(
            np.array([[size[1], size[0]]], dtype=float)
        )[0]
        upright = [view for view in views if not view.is_mirrored]
        return views, min(
            upright, key=lambda view: abs(math.log(math.prod(view.size) / (width * height)))
        )


def original_image(dataset_dict: dict, input_format: str) -> Tensor:
    """The image (3, H, W) of Detectron2's standard input at its own size, on the CPU: views that
    are made of it are resized once.

    Where "image" has another size than "height" and "width" say, or is not there, it is read from
    "file_name"; without that "image" has to do. It is uint8 if its values are whole.
    """
    image = dataset_dict.get("image")
    if image is None or _is_resized(dataset_dict):
        pixels = read_image(dataset_dict["file_name"], format=input_format)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    image = image.cpu()
    # Resizing rounds bytes, but not the float32 that Detectron2's DefaultPredictor makes of them.
    as_bytes = image.to(torch.uint8)
    return as_bytes if torch.equal(as_bytes.to(image.dtype), image) else image


def _is_resized(dataset_dict: dict) -> bool:
    height, width = dataset_dict["image"].shape[-2:]
    asked = (dataset_dict.get("height", height), dataset_dict.get("width", width))
    return "file_name" in dataset_dict and (height, width) != asked


def build_view_maker(cfg) -> ViewMaker:
    """What TEST.AUG says. Raises an InputError for sizes that no view can have."""
    node, test = cfg.TEST.AUG, cfg.INPUT
    is_square = "square" in test.get("AUGMENTATIONS", [])
    sizes, limits = list(node.MIN_SIZES), list(node.BOX_SIZES)
    if not sizes or not all(isinstance(x, int) and x >= is_square for x in sizes):
        raise InputError(f"TEST.AUG.MIN_SIZES is one or more sides in pixels, but it is {sizes}.")
    if node.MAX_SIZE < 1:
        raise InputError(f"TEST.AUG.MAX_SIZE is at least 1, but it is {node.MAX_SIZE}.")
    if limits and len(limits) != len(sizes):
        raise InputError(
            f"TEST.AUG.BOX_SIZES has a pair for each of the {len(sizes)} TEST.AUG.MIN_SIZES, or "
            f"none at all, but it has {len(limits)}."
        )
    for pair in limits:
        if not _is_range(pair):
            raise InputError(
                f"TEST.AUG.BOX_SIZES has pairs of rising sizes such as [0, 160], but also {pair!r}."
            )
    if is_square:
        resizes = [T.Resize((side, side)) for side in sizes]
        plain = T.Resize((test.SQUARE_SIZE, test.SQUARE_SIZE))
    else:
        resizes = [ResizeShortestEdge(side, node.MAX_SIZE) for side in sizes]
        plain = ResizeShortestEdge(test.MIN_SIZE_TEST, test.MAX_SIZE_TEST)
    pairs = [tuple(pair) for pair in limits] or [None] * len(sizes)
    return ViewMaker(resizes, node.FLIP, pairs, plain)


def _is_range(pair: object) -> bool:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return False
    return all(isinstance(x, (int, float)) for x in pair) and 0 <= pair[0] < pair[1]
