"""Pascal VOC folders of a user, and Detectron2's evaluation on them."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

WIDTH, HEIGHT = 64, 48
STRICT = "<pose>Left</pose><truncated>0</truncated>"


def box_xml(*sides: object) -> str:
    tags = ("xmin", "ymin", "xmax", "ymax")
    return "<bndbox>" + "".join(f"<{t}>{v}</{t}>" for t, v in zip(tags, sides)) + "</bndbox>"


def object_xml(name: str, *sides: object, difficult: int | str = 0, extra: str = STRICT) -> str:
    return (
        f"<object><name>{name}</name>{extra}<difficult>{difficult}</difficult>"
        f"{box_xml(*sides)}</object>"
    )


def write_image(folder: Path, stem: str, *objects: str, size: str | None = None) -> Path:
    """Add an image with its XML; returns the XML file."""
    for part in ("Annotations", "JPEGImages"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "JPEGImages" / f"{stem}.jpg")
    if size is None:
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    xml = folder / "Annotations" / f"{stem}.xml"
    xml.write_text(f"<annotation>{size}{''.join(objects)}</annotation>")
    return xml


def write_split(folder: Path, split: str, text: str) -> None:
    file = folder / "ImageSets" / "Main" / f"{split}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def write_pets(folder: Path) -> Path:
    """Two images in `train`, one in `val`; the class `zebra` is in `val` alone."""
    write_image(folder, "a", object_xml("dog", 1, 1, 30, 20), object_xml("cat", 11, 12, 63, 47))
    write_image(folder, "b", object_xml("cat", 5, 6, 40, 41, difficult=1))
    write_image(folder, "c", object_xml("zebra", 5, 6, 40, 41))
    write_split(folder, "train", "b\na\n")
    write_split(folder, "val", "c\n")
    return folder


def precision(name: str) -> dict[str, float]:
    """VOC metrics of a detector that returns the ground truth of a dataset."""
    evaluator = PascalVOCDetectionEvaluator(name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        instances = Instances((record["height"], record["width"]))
        boxes = [a["bbox"] for a in record["annotations"]]
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.scores = torch.full((len(boxes),), 0.9)
        instances.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]
