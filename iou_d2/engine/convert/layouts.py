"""What differs between the layouts beside names: the pixels that their models take."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from iou_d2.errors import InputError

# Where the layouts keep the convolution that sees the image.
FIRST_CONV = re.compile(
    r"(?:.*\.)?stem\.conv1\.weight"  # detectron2, adelaidet, detectron2_main
    r"|(?:backbone\.(?:body\.)?)?conv1\.weight"  # mmdet, torchvision
    r"|(?:backbone\.)?(?:vgg\.)?(?:features\.)?0\.weight"  # SSD and RefineDet
)

# Their configs are Detectron2's and say what pixels are; the other layouts are written for RGB.
WITH_DETECTRON2_PIXELS = ("detectron2", "adelaidet", "detectron2_main")


def swap_red_and_blue(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of a model of RGB images -> of BGR images, or back: its first convolution,
    (C, 3, k, k), with the input channels reversed."""
    name = next((name for name in tensors if FIRST_CONV.fullmatch(name)), None)
    if name is None:
        raise InputError("Red and blue cannot be swapped, for there is no first convolution.")
    shape = tuple(tensors[name].shape)
    if shape[1:2] != (3,):
        raise InputError(
            f"Red and blue cannot be swapped, for {name} has no 3 input channels: its shape is "
            f"{shape}."
        )
    return {**tensors, name: tensors[name].flip(1)}


class PixelFormat(NamedTuple):
    """What a model takes: the order of the channels, "RGB" or "BGR"; mean and standard deviation
    of each in that order, of 0 to 255; and whether its ResNet strides in the 1x1 convolution."""

    order: str = "RGB"
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    stride_in_1x1: bool = False

    def in_order(self, order: str) -> PixelFormat:
        if order == self.order:
            return self
        return self._replace(order=order, mean=self.mean[::-1], std=self.std[::-1])


# Of Detectron2's ResNets, by default.
DETECTRON2_PIXELS = PixelFormat("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), True)


def pixel_format_of_mmdet(config: str, otherwise: PixelFormat | None = None) -> PixelFormat:
    """Read off the text of an mmdetection config; what it does not say is as `otherwise`, or as in
    torchvision.

    Raises an InputError where a mean or a deviation in it is no list of numbers."""
    found = otherwise or PixelFormat()
    order = re.search(r"to_rgb\s*=\s*(True|False)", config)
    if order:
        found = found._replace(order="RGB" if order[1] == "True" else "BGR")
    for name in ("mean", "std"):
        values = re.search(rf"\b{name}\s*=\s*[\[(]([-+.,\deE\s]*)[\])]", config)
        if values:
            found = found._replace(**{name: _numbers(values[0], values[1])})
    return found._replace(stride_in_1x1=bool(re.search(r"\bstyle\s*=\s*['\"]caffe", config)))


def _numbers(words: str, listed: str) -> tuple[float, ...]:
    try:
        return tuple(float(x) for x in listed.split(",") if x.strip())
    except ValueError as error:
        raise InputError(
            f"The mmdetection config in the file has {words}, which is no list of numbers."
        ) from error


def has_linear_p7(config: str) -> bool:
    """Whether the text of an mmdetection config makes p7 of p6 without a ReLU between: what it does
    where it does not say `relu_before_extra_convs`."""
    extra = re.search(r"add_extra_convs\s*=\s*(?!False)", config)
    return bool(extra) and not re.search(r"relu_before_extra_convs\s*=\s*True", config)
