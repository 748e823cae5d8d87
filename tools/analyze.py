"""Show how well a detector's scores rank its boxes, from result files alone.

    python tools/analyze.py --gt instances.json --results coco_instances_results.json --output out

Prints AP by IoU and the correlation of each score with the true IoU; writes score_vs_iou.png and
ap_by_iou.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tabulate import tabulate

from iou_d2.analysis import (
    load_json,
    localization_table,
    plot_ap_by_iou,
    plot_score_vs_iou,
    read_records,
)
from iou_d2.evaluation import IOU_THRESHOLDS, ap_by_iou, coco_precision, summarize_ap


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gt", required=True, help="ground truth, a COCO JSON")
    parser.add_argument("--results", required=True, help="coco_instances_results.json")
    parser.add_argument("--output", required=True, help="folder for the pictures")
    parser.add_argument("--min-iou", type=float, default=0.5, help="boxes with more IoU count")
    parser.add_argument("--max-dets", type=int, help="detections an image and class; all if unset")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        records = read_records(args.gt, args.results)
        ground_truth, results = load_json(args.gt, dict), load_json(args.results, list)
        max_dets = args.max_dets or max(100, len(results))
        precision = coco_precision(ground_truth, results, max_dets=max_dets)
    except (OSError, ValueError) as error:
        sys.exit(str(error))

    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    table = summarize_ap(precision, [category["name"] for category in categories])
    print(tabulate(table.items(), ["metric", "%"], "pipe", floatfmt=".2f"))
    print()
    correlations = localization_table(records, args.min_iou)
    rows = [(name, f"{value:.4g}") for name, value in correlations.items()]
    print(tabulate(rows, [f"IoU > {args.min_iou:g}", ""], "pipe", disable_numparse=True))

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    plot_score_vs_iou(records, output / "score_vs_iou.png", args.min_iou)
    plot_ap_by_iou(IOU_THRESHOLDS, ap_by_iou(precision), output / "ap_by_iou.png")
    print(f"\nPictures: {output / 'score_vs_iou.png'}, {output / 'ap_by_iou.png'}")


if __name__ == "__main__":
    main()
