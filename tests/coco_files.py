"""COCO files of a user, and detections on them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

WIDTH, HEIGHT = 64, 48


def annotation(annotation_id: int, box: list[float], **fields) -> dict:
    return {
        "id": annotation_id,
        "image_id": 1,
        "category_id": 5,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
        **fields,
    }


def write(folder: Path, data: object, images: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    for name in images:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / name)
    file = folder / "train.json"
    file.write_text(json.dumps(data))
    return file


def perfect_predictions(name: str) -> list[tuple[dict, dict]]:
    """Inputs and outputs of a detector that finds every object but the crowds of a dataset."""
    pairs = []
    for record in DatasetCatalog.get(name):
        objects = [a for a in record["annotations"] if not a["iscrowd"]]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.pred_boxes.clip((record["height"], record["width"]))
        instances.scores = torch.full((len(objects),), 0.9)
        instances.pred_classes = torch.tensor([a["category_id"] for a in objects])
        pairs.append((record, {"instances": instances}))
    return pairs


def average_precision(name: str, output_dir: Path, pairs: list[tuple[dict, dict]]) -> float:
    evaluator = COCOEvaluator(
        name, distributed=False, output_dir=str(output_dir), use_fast_impl=False
    )
    evaluator.reset()
    for record, output in pairs:
        evaluator.process([record], [output])
    return evaluator.evaluate()["bbox"]["AP"]


def two_images() -> dict:
    """Two images, two categories with ids in falling order and a gap, two good annotations."""
    return {
        "images": [
            {"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 7, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 5, "name": "cat"}],
        "annotations": [
            annotation(1, [4, 4, 20, 20]),
            annotation(2, [30, 10, 30, 30], category_id=9, image_id=7),
        ],
    }
