"""`iou-d2 export`: writes a trained detector as a file, and checks what it detects."""

from __future__ import annotations

import argparse
import os
import sys

import torch
from detectron2.modeling import build_model

from iou_d2.commands.output import check_output_file
from iou_d2.commands.parsers.export import parse_args
from iou_d2.commands.trained import fill, setup
from iou_d2.engine.checkpoint import split_weights
from iou_d2.engine.export import build_graph
from iou_d2.engine.export.check import check_file
from iou_d2.engine.export.describe import describe
from iou_d2.engine.export.files import InputSpec, write
from iou_d2.engine.safe_load import local_file
from iou_d2.errors import InputError
from iou_d2.runtime.description import Resize, Square

TYPES = {"uint8": torch.uint8, "float32": torch.float32}


def require_size(size: tuple[int, int] | None, resize: Resize) -> None:
    """Raise InputError where a file for one size is not for that of all images."""
    if isinstance(resize, Square) and size not in (None, (resize.side, resize.side)):
        raise InputError(
            f'--size is {size[0]}x{size[1]}, but INPUT.AUGMENTATIONS "square" brings all '
            f"images to INPUT.SQUARE_SIZE: give --size {resize.side}x{resize.side} or dynamic."
        )


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    check_output_file(args.output)
    overrides = [*args.opts, "MODEL.DEVICE", "cpu"]
    cfg, checkpoint = setup(args.config_file, overrides, args.trust_weights)
    model = fill(build_model(cfg).eval(), cfg, checkpoint)
    graph = build_graph(cfg, model, args.outputs, args.deform_conv)
    weights = local_file(split_weights(cfg.MODEL.WEIGHTS)[0])
    description = describe(cfg, model, args.outputs, weights)
    require_size(args.size, description.resize)
    spec = InputSpec(args.size, args.batch, TYPES[args.input])
    write(args.format, graph, args.output, spec, description, args.opset, args.deform_conv)
    size = os.path.getsize(args.output) / 2**20
    inputs = ", ".join(graph.input_names)
    print(f"{args.output} ({size:.1f} MB) gives {', '.join(graph.names)} of {inputs}.")
    fault = check_file(args.output, args.format, graph, spec, cfg)
    if fault:
        sys.exit(fault)
