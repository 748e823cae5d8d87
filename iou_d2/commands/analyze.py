"""`iou-d2 analyze`: AP, and how well scores rank boxes, as tables and pictures."""

from __future__ import annotations

import argparse

import torch
from tabulate import tabulate

from iou_d2.analysis import Records, localization_table, make_records
from iou_d2.analysis.plots import plot_ap_by_iou, plot_score_vs_iou
from iou_d2.analysis.reading import read_ground_truth, read_results, require_annotations
from iou_d2.commands.output import make_folder
from iou_d2.commands.parsers.analyze import parse_args
from iou_d2.errors import InputError
from iou_d2.evaluation import IOU_THRESHOLDS, ap_by_iou, coco_precision, summarize_ap
from iou_d2.ops.nms import batched_nms


def merge_classes(
    ground_truth: dict, results: list[dict], nms_threshold: float = 0.6
) -> tuple[dict, list[dict]]:
    """The same objects and detections, all of the class "object".

    A detector may say of one box that it is this or that; NMS over all classes leaves the better.
    """
    annotations = [{**annotation, "category_id": 1} for annotation in ground_truth["annotations"]]
    category = {"id": 1, "name": "object"}
    merged = {**ground_truth, "annotations": annotations, "categories": [category]}
    if not results:
        return merged, []
    boxes = torch.tensor([result["bbox"] for result in results], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.tensor([result["score"] for result in results])
    images = [result["image_id"] for result in results]
    number = {image: index for index, image in enumerate(sorted(set(images)))}
    images = torch.tensor([number[image] for image in images])
    keep = batched_nms(boxes, scores, images, nms_threshold)
    return merged, [{**results[index], "category_id": 1} for index in keep.tolist()]


def records_of(args: argparse.Namespace, ground_truth: dict, results: list[dict]) -> Records:
    try:
        return make_records(ground_truth, results)
    except ValueError as error:  # keys that only some detections have
        raise InputError(f"{args.results} does not fit {args.gt}: {error}") from error


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    output = make_folder(args.output)
    ground_truth = read_ground_truth(args.gt)
    require_annotations(args.gt, ground_truth)
    results = read_results(args.results, ground_truth)
    if args.class_agnostic:
        ground_truth, results = merge_classes(ground_truth, results)
    records = records_of(args, ground_truth, results)
    max_dets = args.max_dets or max(100, len(results))
    precision = coco_precision(ground_truth, results, max_dets=max_dets)

    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    table = summarize_ap(precision, [category["name"] for category in categories])
    print(tabulate(table.items(), ["metric", "%"], "pipe", floatfmt=".2f"))
    print()
    correlations = localization_table(records, args.min_iou)
    rows = [
        (name, str(value) if isinstance(value, int) else f"{value:.4g}")
        for name, value in correlations.items()
    ]
    print(tabulate(rows, [f"IoU > {args.min_iou:g}", ""], "pipe", disable_numparse=True))

    plot_score_vs_iou(records, output / "score_vs_iou.png", args.min_iou)
    plot_ap_by_iou(IOU_THRESHOLDS, ap_by_iou(precision), output / "ap_by_iou.png")
    print(f"\nPictures: {output / 'score_vs_iou.png'}, {output / 'ap_by_iou.png'}")
