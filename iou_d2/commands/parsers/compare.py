"""Draw finished runs on the same test set beside each other, as curves.

    iou-d2 compare output/unitbox_facemask output/unitbox_facemask_l2 \\
        --output output/unitbox_curves --sides 60 120 240 480 960

Writes and prints recall against false positives at IoU 0.5 (the curve of FDDB), AP against
iteration where the run was trained with TEST.EVAL_PERIOD, and, for every side in --sides, AP
where the shorter side of the test images is resized to so many pixels. The results for the sides
are kept in RUN/sides and taken from there the next time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from iou_d2.commands.arguments import add_trust_argument
from iou_d2.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--output", required=True, type=Path, help="folder for the pictures")
    parser.add_argument("--sides", nargs="*", type=int, default=[], metavar="PIXELS")
    add_trust_argument(parser)
    args = parser.parse_args(argv)
    if any(side < 1 for side in args.sides):
        raise InputError(f"--sides are at least 1 pixel, but they are {args.sides}.")
    return args
