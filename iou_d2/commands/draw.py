"""Draw ground truth beside predictions, from result files alone.

    iou-d2 draw --gt instances.json --images images \\
        --results output/x/inference/coco_instances_results.json --output drawn
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
from pycocotools.coco import COCO

from iou_d2.analysis import load_json
from iou_d2.commands.detect import unlike_names
from iou_d2.detectors.visualize import detection_label, draw_boxes


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

    coco = COCO(arguments.gt)
    categories = {
        category["id"]: (index, category["name"])
        for index, category in enumerate(coco.loadCats(sorted(coco.getCatIds())))
    }
    found = defaultdict(list)
    for record in load_json(arguments.results, list):
        if record["score"] >= arguments.threshold:
            found[record["image_id"]].append(record)

    arguments.output.mkdir(parents=True, exist_ok=True)
    ids = sorted(coco.getImgIds())
    ids = ids[:: max(1, len(ids) // arguments.number)][: arguments.number]
    names = [image["file_name"] for image in coco.loadImgs(ids)]
    pictures = unlike_names([f"{Path(name).stem}.png" for name in names])
    for image_id, name, picture in zip(ids, names, pictures):
        image = cv2.imread(str(arguments.images / name))
        if image is None:
            raise ValueError(f"{arguments.images / name} cannot be read as an image.")
        truth = coco.loadAnns(coco.getAnnIds(image_id))
        best_last = sorted(found[image_id], key=lambda record: record["score"])
        drawn = draw_pair(image, truth, best_last, categories)
        if not cv2.imwrite(str(arguments.output / picture), drawn):
            raise OSError(f"The picture {arguments.output / picture} cannot be written.")
    print(f"Pictures of ground truth (left) and predictions (right) are in {arguments.output}.")


if __name__ == "__main__":
    main()
