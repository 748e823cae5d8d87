"""Draw ground truth beside predictions, from result files alone.

    iou-d2 draw --gt instances.json --images images \\
        --results output/x/inference/coco_instances_results.json --output drawn
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from iou_d2.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gt", required=True, help="ground truth, a COCO JSON")
    parser.add_argument("--images", required=True, type=Path, help="folder of the images")
    parser.add_argument("--results", required=True, help="coco_instances_results.json")
    parser.add_argument("--output", required=True, type=Path, help="folder for the pictures")
    parser.add_argument("--number", type=int, default=12, help="pictures, spread over the set")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score drawn")
    args = parser.parse_args(argv)
    if args.number < 1:
        raise InputError(f"--number is at least 1, but it is {args.number}.")
    if math.isnan(args.threshold):
        raise InputError("--threshold is the lowest score drawn, but it is no number.")
    return args
