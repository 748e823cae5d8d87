"""What the readers of datasets share: what training needs of what they register."""

from __future__ import annotations

import math
import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from iou_d2.data.register import register_dataset
from iou_d2.errors import InputError

from .judge import READ, refused, require, require_nothing_ran

OVERSHOOT = 1.0  # pixels by which boxes may stick out


def judge_dataset(name: str, folder: Path, names: tuple[str, ...]) -> str:
    """Register the dataset `name` in `folder`; a refusal has to hold one of `names`."""
    before = set(DatasetCatalog.list())
    try:
        registered = register_dataset(name, folder / "clean")
        dicts = DatasetCatalog.get(registered)
    except InputError as error:
        require_nothing_ran()
        return refused(error, *names)
    finally:
        new = set(DatasetCatalog.list()) - before
        classes = [MetadataCatalog.get(n).get("thing_classes") for n in new]
        for n in new:
            DatasetCatalog.remove(n)
            MetadataCatalog.remove(n)
    require_nothing_ran()
    _require_trainable(dicts, classes[0] if classes else [], folder)
    return READ


def _require_trainable(dicts: list[dict], classes: list[str], folder: Path) -> None:
    require(len(dicts) > 0, "a dataset without images is registered")
    require(bool(classes) and len(set(classes)) == len(classes), f"the classes are {classes}")
    require(all(isinstance(c, str) and c for c in classes), f"the classes are {classes}")
    ids = [record["image_id"] for record in dicts]
    require(len(set(map(str, ids))) == len(ids), "two images have one id")
    for record in dicts:
        file = record["file_name"]
        require(os.path.isfile(file), f"the image {file} is not there")
        inside = os.path.realpath(file).startswith(str(folder.resolve()))
        require(inside, f"the image {file} lies outside of the folder")
        # Whether it is that of the file is asked where headers are read before training.
        require(record["width"] > 0 and record["height"] > 0, "an image has no size")
        for annotation in record["annotations"]:
            _require_box(annotation, record, len(classes))


def _require_box(annotation: dict, record: dict, classes: int) -> None:
    category = annotation["category_id"]
    require(type(category) is int and 0 <= category < classes, f"the class is {category!r}")
    box = annotation["bbox"]
    x1, y1, x2, y2 = BoxMode.convert(list(box), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    require(all(map(math.isfinite, (x1, y1, x2, y2))), f"the box {box} is not finite")
    require(x2 > x1 and y2 > y1, f"the box {box} has no area")
    edge = record["width"] + OVERSHOOT + 1e-3, record["height"] + OVERSHOOT + 1e-3
    inside = min(x1, y1) >= -OVERSHOOT - 1e-3 and x2 <= edge[0] and y2 <= edge[1]
    require(inside, f"the box {box} lies outside of {record['width']} x {record['height']}")
    require(annotation.get("iscrowd", 0) in (0, 1), "iscrowd is not 0 or 1")
