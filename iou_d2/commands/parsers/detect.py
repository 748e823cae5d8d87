"""Detect objects in pictures, folders, globs or a video with a trained model.

    iou-d2 detect --config output/x/config.yaml --input image.jpg folder "more/*.png" \\
        --output drawn MODEL.WEIGHTS output/x/model_final.pth
    iou-d2 detect --model model.onnx --input folder --output drawn

--output receives each picture with its detections drawn, or the video, and detections.json. A
picture whose ending OpenCV does not write, such as .jfif, is written as .png. One that cannot be
read is reported, the others go on, and the exit status is 1. With --model neither torch nor
Detectron2 is needed.
"""

from __future__ import annotations

import argparse

from iou_d2.commands.arguments import Names, add_trust_argument
from iou_d2.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """`overrides` of the result are the KEY VALUE pairs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", "--config-file", dest="config_file")
    model.add_argument("--model", metavar="FILE", help="what `iou-d2 export` wrote")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        action=Names,
        metavar="PICTURE",
        help="pictures, folders or globs",
    )
    source.add_argument("--video-input", metavar="FILE")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--confidence-threshold", type=float, default=0.5)
    add_trust_argument(parser)
    parser.set_defaults(more_opts=[])
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args(argv)
    args.overrides = [*args.more_opts, *args.opts]
    if not 0 <= args.confidence_threshold <= 1:
        raise InputError(
            f"--confidence-threshold is in [0, 1], but it is {args.confidence_threshold}."
        )
    if args.model and args.overrides:
        raise InputError(
            f"--model has no config, of which {args.overrides[0]} could be a key: export it anew."
        )
    return args
