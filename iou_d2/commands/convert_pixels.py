"""Which pixels the models of `iou-d2 convert` take, and whether red and blue change places."""

from __future__ import annotations

import argparse

from detectron2.config import CfgNode

from iou_d2.commands.convert_files import Checkpoint
from iou_d2.engine.convert import (
    DETECTRON2_PIXELS,
    WITH_DETECTRON2_PIXELS,
    PixelFormat,
    pixel_format_of_mmdet,
    recognise,
)
from iou_d2.errors import InputError


def pixel_format_of_config(cfg: CfgNode) -> PixelFormat:
    mean, std = tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD)
    is_resnet = "vgg" not in cfg.MODEL.BACKBONE.NAME
    strides = is_resnet and cfg.MODEL.RESNETS.STRIDE_IN_1X1
    return PixelFormat(cfg.INPUT.FORMAT, mean, std, strides)


def change_of_pixels(
    args: argparse.Namespace, cfg: CfgNode | None, checkpoint: Checkpoint
) -> tuple[bool, PixelFormat | None]:
    """Whether red and blue change places, and what the model of OUT takes, where that is known."""
    order = args.format or (cfg and cfg.INPUT.FORMAT)
    if cfg and order != cfg.INPUT.FORMAT:
        raise InputError(
            f"--format is {order}, but INPUT.FORMAT in {args.config_file} is {cfg.INPUT.FORMAT}."
        )
    if {args.source, args.target} <= set(WITH_DETECTRON2_PIXELS):
        if args.format and not cfg:
            raise InputError(
                f"--format is for mmdet and torchvision: the pixels of {args.source} and "
                f"{args.target} are those of their Detectron2 config."
            )
        return False, pixel_format_of_config(cfg) if cfg else None
    if args.source in WITH_DETECTRON2_PIXELS and args.source != "detectron2":
        return True, DETECTRON2_PIXELS.in_order("RGB")
    if args.source != "detectron2":
        pixels = pixel_format_of_source(args, cfg, checkpoint)
        return order not in (None, pixels.order), pixels.in_order(order or pixels.order)
    if cfg and cfg.MODEL.RESNETS.STRIDE_IN_1X1 and args.target == "torchvision":
        raise InputError("MODEL.RESNETS.STRIDE_IN_1X1 is on, which no ResNet of torchvision has.")
    wanted = "BGR" if args.target == "mmdet" and cfg and is_caffe(cfg) else "RGB"
    swapped = order not in (None, wanted)
    return swapped, pixel_format_of_config(cfg).in_order(wanted) if cfg else None


def pixel_format_of_source(
    args: argparse.Namespace, cfg: CfgNode | None, checkpoint: Checkpoint
) -> PixelFormat:
    """What the model of IN takes, of a layout without Detectron2's pixels. A file of mmdetection
    without its config is of Caffe's pixels where those of `cfg` are."""
    if args.source == "mmdet" and not checkpoint.config_text and cfg and is_caffe(cfg):
        return pixel_format_of_config(cfg)
    network = recognise(checkpoint.tensors, args.source)
    usual = network.pixels.get(args.source) if network else None
    return pixel_format_of_mmdet(checkpoint.config_text, usual)


def is_caffe(cfg: CfgNode) -> bool:
    """Whether pixels are as Caffe has them, BGR of deviation 1: mmdetection keeps that order for
    the backbones from there, and all others take RGB."""
    return cfg.INPUT.FORMAT == "BGR" and set(cfg.MODEL.PIXEL_STD) == {1.0}


def print_settings(pixels: PixelFormat, target: str) -> None:
    """Print what a config of `target` has to say for the weights to be right."""
    mean, std = list(pixels.mean), list(pixels.std)
    if target == "detectron2":
        print(
            f"The config needs: INPUT.FORMAT {pixels.order} MODEL.PIXEL_MEAN {mean} "
            f"MODEL.PIXEL_STD {std} MODEL.RESNETS.STRIDE_IN_1X1 {pixels.stride_in_1x1}"
        )
    else:
        style = "caffe" if pixels.stride_in_1x1 else "pytorch"
        print(f"The model takes {pixels.order}, mean={mean}, std={std}; its style is {style!r}.")
