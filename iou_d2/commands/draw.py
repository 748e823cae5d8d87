"""`iou-d2 draw`: pictures of ground truth beside predictions. Needs no torch."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from iou_d2.analysis.reading import read_ground_truth, read_results
from iou_d2.commands.drawing import detection_label, draw_boxes
from iou_d2.commands.output import make_folder
from iou_d2.commands.parsers.draw import parse_args
from iou_d2.commands.pictures import read_picture, unlike_names, write_picture


def xyxy(records: list[dict]) -> np.ndarray:
    boxes = np.array([record["bbox"] for record in records], dtype=np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    gap = np.full((left.shape[0], 8, 3), 255, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def draw_pair(
    image: np.ndarray, truth: list[dict], found: list[dict], categories: dict[int, tuple[int, str]]
) -> np.ndarray:
    """Ground truth on the left, predictions on the right. `categories`: id -> (colour, name)."""

    def draw(records: list[dict], labels: list[str]) -> np.ndarray:
        colors = [categories[record["category_id"]][0] for record in records]
        return draw_boxes(image, xyxy(records), colors, labels)

    truth_labels = [
        categories[record["category_id"]][1] + (" crowd" if record.get("iscrowd") else "")
        for record in truth
    ]
    found_labels = [
        detection_label(categories[r["category_id"]][1], r["score"], r.get("pred_iou"))
        for r in found
    ]
    return beside(draw(truth, truth_labels), draw(found, found_labels))


def draw_all(args: argparse.Namespace, truth: dict, results: list[dict], output: Path) -> None:
    """Draw `args.number` images of the ground truth, spread evenly, into `output`."""
    ordered = sorted(truth["categories"], key=lambda category: category["id"])
    categories = {x["id"]: (index, x["name"]) for index, x in enumerate(ordered)}
    objects, found = defaultdict(list), defaultdict(list)
    for annotation in truth.get("annotations", ()):
        objects[annotation["image_id"]].append(annotation)
    for record in sorted(results, key=lambda record: record["score"]):  # the best on top
        if record["score"] >= args.threshold:
            found[record["image_id"]].append(record)

    images = sorted(truth["images"], key=lambda image: image["id"])
    images = images[:: max(1, len(images) // args.number)][: args.number]
    pictures = unlike_names([f"{Path(image['file_name']).stem}.png" for image in images])
    for image, picture in zip(images, pictures):
        pixels = read_picture(args.images / image["file_name"])
        drawn = draw_pair(pixels, objects[image["id"]], found[image["id"]], categories)
        write_picture(output / picture, drawn)


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    output = make_folder(args.output)
    truth = read_ground_truth(args.gt)
    results = read_results(args.results, truth)
    draw_all(args, truth, results, output)
    print(f"Pictures of ground truth (left) and predictions (right) are in {args.output}.")
