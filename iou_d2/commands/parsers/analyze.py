"""Show how well a detector's scores rank its boxes, from result files alone.

    iou-d2 analyze --gt instances.json --results coco_instances_results.json --output out

Prints AP by IoU and the correlation of each score with the true IoU; writes score_vs_iou.png and
ap_by_iou.png. With --class-agnostic all objects are of one class, so that AP says how well boxes
are found and ranked, and nothing about their classes.
"""

from __future__ import annotations

import argparse

from iou_d2.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gt", required=True, help="ground truth, a COCO JSON")
    add("--results", required=True, help="coco_instances_results.json")
    add("--output", required=True, help="folder for the pictures")
    add("--min-iou", type=float, default=0.5, help="boxes with more IoU count")
    add("--max-dets", type=int, help="detections an image and class; all if unset")
    add("--class-agnostic", action="store_true", help="as if there were one class")
    args = parser.parse_args(argv)
    if args.max_dets is not None and args.max_dets < 1:
        raise InputError(f"--max-dets is at least 1, but it is {args.max_dets}.")
    if not 0 <= args.min_iou < 1:
        raise InputError(f"--min-iou is in [0, 1), but it is {args.min_iou}.")
    return args
