"""Write a trained detector as a file that ONNX Runtime, TorchScript or torch.export runs.

    iou-d2 export --config output/x/config.yaml --output model.onnx \\
        MODEL.WEIGHTS output/x/model_final.pth

Normalisation, padding and NMS are in the file, which says in its metadata what it wants: see
docs/EXPORT.md. What it detects in two random images is compared with what the model detects.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from detectron2.modeling import build_model

from iou_d2.commands.detect import setup
from iou_d2.commands.output import check_output_file
from iou_d2.commands.trained import add_trust_argument, fill
from iou_d2.engine.checkpoint import split_weights
from iou_d2.engine.export import FORMATS, OUTPUTS, build_graph
from iou_d2.engine.export.check import check_file
from iou_d2.engine.export.describe import describe
from iou_d2.engine.export.files import OPSETS, InputSpec, write
from iou_d2.engine.safe_load import local_file
from iou_d2.errors import InputError
from iou_d2.runtime.description import Resize, Square

TYPES = {"uint8": torch.uint8, "float32": torch.float32}


def size_of(text: str) -> tuple[int, int] | None:
    """ "800x1333" -> (800, 1333); "dynamic" -> None."""
    if text == "dynamic":
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(
            f"a size is HEIGHTxWIDTH in pixels, such as 800x1333, or dynamic, not {text!r}"
        )
    return int(height), int(width)


def batch_of(text: str) -> int | None:
    """A number of images, or None for "dynamic"."""
    if text == "dynamic":
        return None
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(
            f"a batch is a number of images from 1 on, or dynamic, not {text!r}"
        )
    return int(text)


def require_size(size: tuple[int, int] | None, resize: Resize) -> None:
    """Raise InputError where a file for one size is not for that of all images."""
    if isinstance(resize, Square) and size not in (None, (resize.side, resize.side)):
        raise InputError(
            f'--size is {size[0]}x{size[1]}, but INPUT.AUGMENTATIONS "square" brings all '
            f"images to INPUT.SQUARE_SIZE: give --size {resize.side}x{resize.side} or dynamic."
        )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", "--config-file", required=True, dest="config_file", metavar="CONFIG")
    add("--output", required=True, metavar="FILE", help="such as model.onnx")
    add("--format", choices=FORMATS, default="onnx")
    add(
        "--with",
        choices=OUTPUTS,
        default="detections",
        dest="outputs",
        help="all points, anchors or proposals, what NMS is given, what it leaves (default), or "
        "what IoU-Net makes of the detections of any detector",
    )
    add("--size", type=size_of, default="dynamic", metavar="HxW", help="pixels, or dynamic")
    add("--batch", type=batch_of, default="dynamic", metavar="N", help="images, or dynamic")
    add("--input", choices=TYPES, default="uint8", help="type of the images, 0..255 in both")
    add("--opset", type=int, default=17, metavar="N", help=f"{OPSETS[0]} to {OPSETS[-1]}")
    add(
        "--deform-conv",
        choices=("GridSample", "DeformConv"),
        default="GridSample",
        help="what deformable convolutions become; DeformConv from opset 19 on",
    )
    add_trust_argument(parser)
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
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


if __name__ == "__main__":
    main()
