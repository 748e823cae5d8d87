"""Draw ground truth beside predictions, from result files alone.

    iou-d2 draw --gt instances.json --images images \\
        --results output/x/inference/coco_instances_results.json --output drawn
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from iou_d2.analysis.reading import read_ground_truth, read_results
from iou_d2.commands.output import make_folder
from iou_d2.commands.pictures import read_picture, unlike_names, write_picture
from iou_d2.detectors.visualize import detection_label, draw_boxes
from iou_d2.errors import InputError


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


def draw_all(arguments: argparse.Namespace, truth: dict, results: list[dict], output: Path) -> None:
    """Draw `arguments.number` images of the ground truth, spread evenly, into `output`."""
    ordered = sorted(truth["categories"], key=lambda category: category["id"])
    categories = {x["id"]: (index, x["name"]) for index, x in enumerate(ordered)}
    objects, found = defaultdict(list), defaultdict(list)
    for annotation in truth.get("annotations", ()):
        objects[annotation["image_id"]].append(annotation)
    for record in sorted(results, key=lambda record: record["score"]):  # the best on top
        if record["score"] >= arguments.threshold:
            found[record["image_id"]].append(record)

    images = sorted(truth["images"], key=lambda image: image["id"])
    images = images[:: max(1, len(images) // arguments.number)][: arguments.number]
    pictures = unlike_names([f"{Path(image['file_name']).stem}.png" for image in images])
    for image, picture in zip(images, pictures):
        pixels = read_picture(arguments.images / image["file_name"])
        drawn = draw_pair(pixels, objects[image["id"]], found[image["id"]], categories)
        write_picture(output / picture, drawn)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gt", required=True, help="ground truth, a COCO JSON")
    parser.add_argument("--images", required=True, type=Path, help="folder of the images")
    parser.add_argument("--results", required=True, help="coco_instances_results.json")
    parser.add_argument("--output", required=True, type=Path, help="folder for the pictures")
    parser.add_argument("--number", type=int, default=12, help="pictures, spread over the set")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score drawn")
    arguments = parser.parse_args(argv)

    if arguments.number < 1:
        raise InputError(f"--number is at least 1, but it is {arguments.number}.")
    output = make_folder(arguments.output)
    truth = read_ground_truth(arguments.gt)
    results = read_results(arguments.results, truth)
    draw_all(arguments, truth, results, output)
    print(f"Pictures of ground truth (left) and predictions (right) are in {arguments.output}.")


if __name__ == "__main__":
    main()
