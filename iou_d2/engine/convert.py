"""What differs between checkpoints of mmdetection, torchvision and Detectron2.

Pure functions on the names of tensors. A layout is "mmdet", "torchvision" or "detectron2"; two
layouts are translated into one another through Detectron2's names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from torch import Tensor

from iou_d2.errors import InputError

LAYOUTS = ("mmdet", "torchvision", "detectron2")
BOTTOM_UP = "backbone.bottom_up."  # where an FPN of Detectron2 keeps its ResNet
FIRST_CONV = "stem.conv1.weight"


# Tables of (their name, Detectron2's name). "#" stands for a number, "*" for the last part of a
# name; where two rows have the same name of Detectron2, the first is the one to write.
def _resnet_rows() -> list[tuple[str, str]]:
    rows = [("conv1.weight", FIRST_CONV), ("bn1.*", "stem.conv1.norm.*")]
    for stage in (1, 2, 3, 4):
        theirs, ours = f"layer{stage}.#.", f"res{stage + 1}.#."
        rows += [
            (theirs + "conv#.weight", ours + "conv#.weight"),
            (theirs + "bn#.*", ours + "conv#.norm.*"),
            (theirs + "downsample.0.weight", ours + "shortcut.weight"),
            (theirs + "downsample.1.*", ours + "shortcut.norm.*"),
            (theirs + "conv#.conv_offset.*", ours + "conv#_offset.*"),
            (theirs + "conv#_offset.*", ours + "conv#_offset.*"),  # mmdetection 1.x
        ]
    return rows


def _conv_module(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Rows of mmcv's ConvModule, a convolution and its GroupNorm."""
    return [
        (theirs + ".conv.*", ours + ".*"),
        (theirs + ".gn.*", ours + ".norm.*"),
        (theirs + ".conv.conv_offset.*", ours + ".offset.*"),
    ]


def _neck_rows(first_level: int) -> list[tuple[str, str]]:
    """Rows of an FPN on res`first_level` to res5, with p6 and p7 by convolutions where it has
    them."""
    rows = []
    for index, level in enumerate(range(first_level, 6)):
        rows += _conv_module(f"neck.lateral_convs.{index}", f"backbone.fpn_lateral{level}")
        rows += _conv_module(f"neck.fpn_convs.{index}", f"backbone.fpn_output{level}")
    for level in (6, 7):
        index = level - first_level
        rows.append((f"neck.fpn_convs.{index}.conv.*", f"backbone.top_block.p{level}.*"))
    return rows


RESNET_ROWS = _resnet_rows()
CLASSIFIER_ROWS = [("fc.*", "stem.fc.*")]  # as in Detectron2's own R-50.pkl
HEAD_ROWS = [
    *_conv_module("bbox_head.cls_convs.#", "head.cls_tower.#"),
    *_conv_module("bbox_head.reg_convs.#", "head.box_tower.#"),
    *_conv_module("bbox_head.vfnet_reg_conv", "head.initial_conv"),
    ("bbox_head.vfnet_reg.*", "head.initial_pred.*"),
    ("bbox_head.scales.#.scale", "head.initial_scales.#"),
    ("bbox_head.vfnet_reg_refine_dconv.weight", "head.refine_star.weight"),
    ("bbox_head.vfnet_reg_refine.*", "head.refine_pred.*"),
    ("bbox_head.scales_refine.#.scale", "head.refine_scales.#"),
    ("bbox_head.vfnet_cls_dconv.weight", "head.cls_star.weight"),
    ("bbox_head.vfnet_cls.*", "head.cls_pred.*"),
]
UNSUPPORTED = {
    r"layer\d\.\d+\.convs\.\d": "a Res2Net",
    r"backbone\.stem\.\d": "a ResNet with a deep stem (V1c, V1d)",
    r"neck\.(downsample_convs|pafpn_convs)": "the PAFPN of VFNet-X",
}


def translate(names: Collection[str], source: str, target: str) -> dict[str, str]:
    """Names of layout `source` -> names of layout `target`, for those that both layouts have.

    A ResNet without a detector gets no prefix in Detectron2, as in its ImageNet models.

    Raises:
        InputError: the names are of a network that the target cannot build, or two of them stand
            for the same parameter.
    """
    _check_supported(names)
    detector = _neck_rows(2 if _any(r"lateral_convs\.3\.|fpn_lateral2\.", names) else 3)
    if _any(r"bbox_head\.vfnet_|head\.cls_star\.", names):
        detector += HEAD_ROWS
    prefix = backbone_prefix(names) if source == "detectron2" else BOTTOM_UP
    hub = _rename(names, _rows(source, detector, prefix))
    prefix = "" if source == "torchvision" else BOTTOM_UP
    back = [(hub_name, name) for name, hub_name in _rows(target, detector, prefix)]
    renamed = _rename(hub.values(), back)

    translated, origin = {}, {}
    for name, hub_name in hub.items():
        if hub_name not in renamed:
            continue
        if origin.setdefault(hub_name, name) != name:
            raise InputError(f"{origin[hub_name]} and {name} stand for the same parameter.")
        translated[name] = renamed[hub_name]
    return translated


def backbone_prefix(names: Iterable[str]) -> str:
    """What stands before `stem.conv1.weight` in names of Detectron2: mostly BOTTOM_UP."""
    for name in names:
        if name == FIRST_CONV or name.endswith("." + FIRST_CONV):
            return name[: -len(FIRST_CONV)]
    return BOTTOM_UP


def _any(pattern: str, names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


def _rows(layout: str, detector: list[tuple[str, str]], prefix: str) -> list[tuple[str, str]]:
    """(name in `layout`, name of a detector in Detectron2), of a ResNet and of `detector`, which
    torchvision lacks; `prefix` is that of the ResNet in layout detectron2."""
    resnet = RESNET_ROWS + CLASSIFIER_ROWS
    if layout == "torchvision":
        return [(theirs, BOTTOM_UP + ours) for theirs, ours in resnet]
    if layout == "mmdet":
        return [("backbone." + theirs, BOTTOM_UP + ours) for theirs, ours in RESNET_ROWS] + detector
    rows = [(prefix + ours, BOTTOM_UP + ours) for _, ours in resnet]
    return rows + [(ours, ours) for _, ours in detector]


def _rename(names: Iterable[str], rows: list[tuple[str, str]]) -> dict[str, str]:
    """Name -> its new name, by the first row whose left side it matches."""
    rules = []
    for old, new in rows:
        pattern = re.escape(old).replace(r"\#", r"(\d+)").replace(r"\*", r"(\w+)")
        rules.append((re.compile(pattern), re.sub("[#*]", "{}", new)))
    renamed = {}
    for name in names:
        for pattern, new in rules:
            match = pattern.fullmatch(name)
            if match:
                renamed[name] = new.format(*match.groups())
                break
    return renamed


def _check_supported(names: Iterable[str]) -> None:
    for name in names:
        for pattern, network in UNSUPPORTED.items():
            if re.search(pattern, name):
                raise InputError(f"{name} is of {network}, which cannot be converted.")


def swap_red_and_blue(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """`tensors` of a model of RGB images -> of BGR images, or back: its first convolution,
    (C, 3, k, k), with the input channels reversed."""
    name = {
        "mmdet": "backbone.conv1.weight",
        "torchvision": "conv1.weight",
        "detectron2": backbone_prefix(tensors) + FIRST_CONV,
    }[layout]
    if name not in tensors:
        raise InputError(f"Red and blue cannot be swapped, for {name} is not there.")
    if tensors[name].shape[1] != 3:
        raise InputError(f"Red and blue cannot be swapped, for {name} has no 3 input channels.")
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


def pixel_format_of_mmdet(config: str) -> PixelFormat:
    """Read off the text of an mmdetection config; what it does not say is as in torchvision."""
    found = PixelFormat()
    order = re.search(r"to_rgb\s*=\s*(True|False)", config)
    if order:
        found = found._replace(order="RGB" if order[1] == "True" else "BGR")
    for name in ("mean", "std"):
        values = re.search(rf"\b{name}\s*=\s*[\[(]([-+.,\deE\s]*)[\])]", config)
        if values:
            numbers = tuple(float(x) for x in values[1].split(",") if x.strip())
            found = found._replace(**{name: numbers})
    return found._replace(stride_in_1x1=bool(re.search(r"\bstyle\s*=\s*['\"]caffe", config)))
