"""A table of AP and correlations from the metrics.json of finished runs, in Markdown.

iou-d2 table output/retinanet_shapes output/iou_retinanet_shapes
"""

from __future__ import annotations

import argparse
from pathlib import Path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT_DIR")
    return parser.parse_args(argv)
