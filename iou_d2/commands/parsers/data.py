"""Look at datasets before training on them.

    iou-d2 data check coco:train.json coco:val.json --output output/data_check

Tells what is refused or was mended, counts classes and sizes, compares the sets with each other,
says which configs fit, and draws some images with their boxes into pictures.png. Trains nothing.
Exit status 1 where training on a set, or evaluation, would end in an error.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    check_parser = parser.add_subparsers(required=True, metavar="check").add_parser("check")
    add = check_parser.add_argument
    add("names", nargs="+", metavar="NAME", help="as in DATASETS.TRAIN, such as coco:train.json")
    add("--output", type=Path, default=Path("output/data_check"), metavar="FOLDER")
    add("--config", nargs="+", metavar="CONFIG", help="in place of those that come with iou_d2")
    add("--trust-boxes", action="store_true", help="as DATASETS.TRUST_BOXES True in training")
    add("--trust-paths", action="store_true", help="as DATASETS.TRUST_PATHS True in training")
    return parser.parse_args(argv)
