"""ResNet, ResNeXt and their FPN, the part that all detectors share."""

from __future__ import annotations

from collections.abc import Iterable

from .rows import Row

BOTTOM_UP = "backbone.bottom_up."  # where an FPN of Detectron2 keeps its ResNet
FIRST_CONV = "stem.conv1.weight"


def backbone_prefix(names: Iterable[str]) -> str:
    """What stands before `stem.conv1.weight` in names of Detectron2: mostly BOTTOM_UP."""
    for name in names:
        if name == FIRST_CONV or name.endswith("." + FIRST_CONV):
            return name[: -len(FIRST_CONV)]
    return BOTTOM_UP


def resnet_rows(prefix: str) -> list[Row]:
    """A ResNet whose names begin with `prefix` elsewhere."""
    stem = [("conv1.weight", FIRST_CONV), ("bn1.*", "stem.conv1.norm.*")]
    rows = [Row(prefix + theirs, BOTTOM_UP + ours) for theirs, ours in stem]
    for stage in (1, 2, 3, 4):
        theirs, ours = f"{prefix}layer{stage}.#.", f"{BOTTOM_UP}res{stage + 1}.#."
        rows += [
            Row(theirs + "conv#.weight", ours + "conv#.weight"),
            Row(theirs + "bn#.*", ours + "conv#.norm.*"),
            Row(theirs + "downsample.0.weight", ours + "shortcut.weight"),
            Row(theirs + "downsample.1.*", ours + "shortcut.norm.*"),
            Row(theirs + "conv#.conv_offset.*", ours + "conv#_offset.*"),
            Row(theirs + "conv#_offset.*", ours + "conv#_offset.*"),  # mmdetection 1.x
        ]
    return rows


def classifier_rows() -> list[Row]:
    """Of an ImageNet model of torchvision, as in Detectron2's own R-50.pkl."""
    return [Row("fc.*", BOTTOM_UP + "stem.fc.*")]


def conv_module(theirs: str, ours: str) -> list[Row]:
    """mmcv's ConvModule, a convolution and its norm."""
    return [
        Row(theirs + ".conv.*", ours + ".*"),
        Row(theirs + ".gn.*", ours + ".norm.*"),
        Row(theirs + ".bn.*", ours + ".norm.*"),
        Row(theirs + ".conv.conv_offset.*", ours + ".offset.*"),
    ]


def mmdet_fpn_rows(first_level: int) -> list[Row]:
    """An FPN on res`first_level` to res5, with p6 and p7 by convolutions where it has them."""
    rows = []
    for index, level in enumerate(range(first_level, 6)):
        rows += conv_module(f"neck.lateral_convs.{index}", f"backbone.fpn_lateral{level}")
        rows += conv_module(f"neck.fpn_convs.{index}", f"backbone.fpn_output{level}")
    for level in (6, 7):
        index = level - first_level
        rows.append(Row(f"neck.fpn_convs.{index}.conv.*", f"backbone.top_block.p{level}.*"))
    return rows


def torchvision_fpn_rows(first_level: int) -> list[Row]:
    """The same of torchvision's detectors, of which those before 0.13 have names without ".0"."""
    rows = []
    for index, level in enumerate(range(first_level, 6)):
        for theirs, ours in (("inner_blocks", "fpn_lateral"), ("layer_blocks", "fpn_output")):
            theirs, ours = f"backbone.fpn.{theirs}.{index}", f"backbone.{ours}{level}"
            rows += [
                Row(f"{theirs}.0.*", f"{ours}.*"),
                Row(f"{theirs}.1.*", f"{ours}.norm.*"),
                Row(f"{theirs}.*", f"{ours}.*"),
            ]
    for level in (6, 7):
        rows.append(Row(f"backbone.fpn.extra_blocks.p{level}.*", f"backbone.top_block.p{level}.*"))
    return rows


def same_rows(first_level: int) -> list[Row]:
    """ResNet and FPN of a project that keeps Detectron2's names."""
    ours = resnet_rows("") + torchvision_fpn_rows(first_level)
    return [Row(row.ours, row.ours) for row in ours]
