"""Show what AP a detector would have if its boxes, classes or IoUs were true.

    iou-d2 oracle --config output/x/config.yaml --test coco:val.json [--output output/x/oracle] \\
        MODEL.WEIGHTS output/x/model_final.pth

The oracles of VarifocalNet's Table 1, and IoU-Net's: what they are stands in docs/ORACLE.md. Prints
a table; writes oracle.json, oracle.png and the detections of each row.
"""

from __future__ import annotations

import argparse

from iou_d2.commands.arguments import Names, add_config_arguments, add_trust_argument

# Those of iou_d2.engine.oracle.
ORACLES = ("gt_ctr", "gt_ctr_iou", "gt_bbox", "gt_cls", "gt_cls_iou", "gt_iou_rank")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", metavar="FOLDER", help="by default oracle in OUTPUT_DIR")
    parser.add_argument(
        "--oracles",
        nargs="+",
        action=Names,
        metavar="ORACLE",
        help=f"of {', '.join(ORACLES)} (all by default); gt_bbox+gt_cls does both",
    )
    add_trust_argument(parser)
    add_config_arguments(parser)
    return parser.parse_args(argv)
