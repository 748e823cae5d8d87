"""Learn what predicted IoUs are worth on held-out data, and write it beside the weights.

    iou-d2 calibrate --run output/x --test coco:held_out.json
    iou-d2 calibrate --config output/x/config.yaml --test coco:held_out.json \\
        MODEL.WEIGHTS output/x/model_final.pth
    iou-d2 eval --config output/x/config.yaml --test coco:test.json \\
        MODEL.WEIGHTS output/x/model_final.pth \\
        MODEL.CALIBRATION output/x/model_final.calibration.json

Fits an isotonic regression of the true IoU of detections on the predicted one, and prints how far
both, and the confidence, are off on images that the fit has not seen: docs/ORACLE.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from iou_d2.commands.arguments import add_config_arguments, add_trust_argument
from iou_d2.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", type=Path, metavar="FOLDER", help="with config.yaml and model_final.pth")
    add("--output", metavar="FILE", help="by default beside the weights: NAME.calibration.json")
    add(
        "--min-iou",
        type=float,
        default=0.0,
        help="detections of at least this true IoU count (default: all, false ones with 0)",
    )
    add("--share", type=float, default=0.5, help="of the images to fit on; the others judge it")
    add_trust_argument(parser)
    add_config_arguments(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.min_iou < 1:
        raise InputError(f"--min-iou is in [0, 1), but it is {args.min_iou}.")
    if not 0 < args.share < 1:
        raise InputError(f"--share is between 0 and 1, but it is {args.share}.")
    if args.run is not None and args.config_file:
        raise InputError("--run has its own config: leave --config out.")
    return args
