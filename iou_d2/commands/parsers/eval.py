"""Evaluate a trained detector: `iou-d2 train --eval-only`. Or one that was exported.

    iou-d2 eval --config output/x/config.yaml --test coco:val.json \\
        MODEL.WEIGHTS output/x/model_final.pth
    iou-d2 eval --model model.onnx --test coco:val.json OUTPUT_DIR output/x
"""

from __future__ import annotations

import argparse
import sys

from iou_d2.commands.arguments import add_config_arguments
from iou_d2.commands.parsers import train
from iou_d2.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """`model` of the result is the exported file, or None: then they are arguments of training."""
    argv = sys.argv[1:] if argv is None else argv
    if not any(argument.split("=")[0] == "--model" for argument in argv):
        parser = train.make_parser(__doc__)
        parser.set_defaults(model=None)
        return parser.parse_args(["--eval-only", *argv])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="FILE", help="of `iou-d2 export`")
    add_config_arguments(parser)
    args = parser.parse_args(argv)
    if args.config_file:
        raise InputError("--model knows how it was trained: leave --config out.")
    return args
