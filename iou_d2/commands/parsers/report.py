"""Write one page on finished runs, or on result files of any detector.

    iou-d2 report output/x output/y --output report.html
    iou-d2 report --gt instances.json --results coco_instances_results.json --images images

The page is one file that opens without a network: metrics, losses, curves, errors by type,
confusion, calibration, and pictures of the best and the worst images. Several runs, or several
--results, stand side by side. With --gt neither torch nor Detectron2 is needed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from iou_d2.errors import InputError, MissingFileError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """`command` of the result is the line that repeats it."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="OUTPUT_DIR of a run")
    parser.add_argument("--gt", help="ground truth, a COCO JSON")
    parser.add_argument("--results", nargs="+", default=[], help="COCO results, one or several")
    parser.add_argument("--images", type=Path, help="folder of the images of --gt")
    parser.add_argument("--names", nargs="+", help="how the page calls each run or results file")
    parser.add_argument("--output", default="report.html", help="the file; report.html if unset")
    parser.add_argument("--max-dets", type=int, help="detections an image and class; 100 if unset")
    parser.add_argument("--pictures", type=int, default=20, help="images a list; 20 if unset")
    parser.add_argument("--draws", type=int, default=1000, help="of the paired bootstrap")
    parser.add_argument("--fiftyone", metavar="NAME", help="also make a dataset of FiftyOne")
    parser.set_defaults(command=shlex.join(["iou-d2", "report", *argv]))
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    if bool(args.runs) == bool(args.gt or args.results):
        raise InputError("Give either finished runs, or --gt with --results.")
    if bool(args.gt) != bool(args.results):
        raise InputError("--gt and --results go together.")
    if args.runs and (args.images or args.max_dets is not None):
        raise InputError("--images and --max-dets go with --gt: a run knows its own.")
    if args.images and not args.images.is_dir():
        raise MissingFileError(f"There is no folder {args.images}.")
    for name, least in (("max_dets", 1), ("pictures", 0), ("draws", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} is at least {least}, but it is {value}.")
    number = len(args.runs) or len(args.results)
    if args.names and len(args.names) != number:
        raise InputError(f"--names has {len(args.names)} names for {number} results.")
