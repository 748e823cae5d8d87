"""Seconds and memory to evaluate 500,000 detections, beside Detectron2's own evaluator.

Each runs in a process of its own, on the same generated boxes: 5,000 images, 80 classes, 100
detections an image. The peak is that of the process over what its imports take.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from common import machine

IMAGES, CLASSES, PER_IMAGE, OBJECTS = 5000, 80, 100, 7
SIDE = 640


def write_truth(path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [
        {"id": i, "file_name": f"{i}.jpg", "width": SIDE, "height": SIDE}
        for i in range(1, IMAGES + 1)
    ]
    boxes = np.concatenate(
        [
            rng.uniform(0, SIDE / 2, (IMAGES * OBJECTS, 2)),
            rng.uniform(8, 300, (IMAGES * OBJECTS, 2)),
        ],
        axis=1,
    ).round(2)
    annotations = [
        {
            "id": row + 1,
            "image_id": row // OBJECTS + 1,
            "category_id": int(rng.integers(CLASSES)) + 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for row, box in enumerate(boxes.tolist())
    ]
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(truth))


def predictions(path: Path):
    """Of each image: its inputs, and a detector's output around its objects."""
    from detectron2.structures import Boxes, Instances

    truth, objects = json.loads(path.read_text()), {}
    for annotation in truth["annotations"]:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    generator = torch.Generator().manual_seed(0)
    for image in truth["images"]:
        mine = objects[image["id"]]
        rows = torch.randint(len(mine), (PER_IMAGE,), generator=generator)
        boxes = torch.tensor([a["bbox"] for a in mine])[rows]
        boxes[:, 2:] += boxes[:, :2]
        boxes += 10 * torch.randn(PER_IMAGE, 4, generator=generator)
        classes = torch.tensor([a["category_id"] - 1 for a in mine])[rows]
        output = Instances((SIDE, SIDE), pred_boxes=Boxes(boxes), pred_classes=classes)
        output.scores = torch.rand(PER_IMAGE, generator=generator)
        yield {"image_id": image["id"]}, {"instances": output}


def evaluate(kind: str, json_file: Path, folder: Path) -> tuple[float, float, float]:
    """Seconds of `evaluate`, peak memory in GB, AP; in a fresh process."""
    from detectron2.data.datasets import register_coco_instances
    from detectron2.evaluation import COCOEvaluator

    from iou_d2.evaluation.coco import COCOLocalizationEvaluator

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    register_coco_instances("boxes", {}, str(json_file), "")
    if kind == "iou_d2":
        evaluator = COCOLocalizationEvaluator("boxes", str(folder))
    else:
        evaluator = COCOEvaluator("boxes", ("bbox",), output_dir=str(folder), use_fast_impl=False)
    evaluator._metadata.thing_dataset_id_to_contiguous_id = {k + 1: k for k in range(CLASSES)}
    evaluator.reset()
    for inputs, output in predictions(json_file):
        evaluator.process([inputs], [output])
    start = time.perf_counter()
    results = evaluator.evaluate()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - imported
    return seconds, peak / 2**20, results["bbox"]["AP"]


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        json_file = Path(folder, "instances.json")
        write_truth(json_file)
        for kind in ("iou_d2", "Detectron2 with pycocotools"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append((kind, *pool.apply(evaluate, (kind, json_file, Path(folder, "out")))))
    print(f"Evaluating {IMAGES * PER_IMAGE:,} detections; {machine()}\n")
    print(tabulate(rows, ["evaluator", "seconds", "peak GB", "AP"], "pipe", floatfmt=".2f"))


if __name__ == "__main__":
    main()
