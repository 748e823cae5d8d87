"""The classes of a run, matched by name: each reader follows them, and so does the evaluation."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from iou_d2.data.classes import match_classes
from iou_d2.data.register import register_dataset
from iou_d2.errors import InputError
from iou_d2.evaluation import build_evaluator

WIDTH, HEIGHT = 64, 32  # powers of two: fractions of them are exact
# Class and XYXY box of each object; the files below count classes from cat, cow, dog.
OBJECTS = [("dog", (10, 10, 30, 30)), ("cat", (40, 4, 60, 28)), ("cow", (0, 0, 8, 8))]
NAMES = ["cat", "cow", "dog"]


def coco(folder) -> str:
    annotations = [
        {"id": i, "image_id": 1, "category_id": NAMES.index(name), "bbox": [x, y, x1 - x, y1 - y]}
        for i, (name, (x, y, x1, y1)) in enumerate(OBJECTS, start=1)
    ]
    for item in annotations:
        item |= {"area": item["bbox"][2] * item["bbox"][3], "iscrowd": 0}
    data = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
        "annotations": annotations,
    }
    (folder / "ann.json").write_text(json.dumps(data))
    return f"coco:{folder / 'ann.json'}"


def voc(folder) -> str:
    (folder / "Annotations").mkdir()
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, (x, y, x1, y1) in OBJECTS
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    (folder / "Annotations" / "a.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (folder / "images").rename(folder / "JPEGImages")
    return f"voc:{folder}"


def yolo(folder) -> str:
    (folder / "labels").mkdir()
    lines = [
        f"{NAMES.index(name)} {(x + x1) / 2 / WIDTH} {(y + y1) / 2 / HEIGHT} "
        f"{(x1 - x) / WIDTH} {(y1 - y) / HEIGHT}\n"
        for name, (x, y, x1, y1) in OBJECTS
    ]
    (folder / "labels" / "a.txt").write_text("".join(lines))
    (folder / "data.yaml").write_text(f"train: images\nnames: [{', '.join(NAMES)}]\n")
    return f"yolo:{folder / 'data.yaml'}:train"


@pytest.fixture(params=[coco, voc, yolo], ids=lambda write: write.__name__)
def name(request, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / "a.jpg")
    return register_dataset(request.param(tmp_path), tmp_path / "clean")


def objects(name: str) -> dict[int, list[float]]:
    (record,) = DatasetCatalog.get(name)
    return {
        a["category_id"]: BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
        for a in record["annotations"]
    }


def precision(name: str, classes: list[str], folder) -> dict:
    """AP of a detector of `classes` that finds OBJECTS, of those it knows, at their places."""
    found = [(classes.index(c), box) for c, box in OBJECTS if c in classes]
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes = Boxes(torch.tensor([box for _, box in found]).float())
    instances.scores = torch.full((len(found),), 0.9)
    instances.pred_classes = torch.tensor([index for index, _ in found])
    cfg = get_cfg()
    cfg.DATASETS.TEST = (name,)
    evaluator = build_evaluator(cfg, name, str(folder))
    evaluator.reset()
    evaluator.process(DatasetCatalog.get(name), [{"instances": instances}])
    return evaluator.evaluate()


def test_another_order_and_a_class_more(name, tmp_path):
    classes = ["dog", "emu", "cat", "cow"]
    match_classes(name, classes, "model.pth")
    assert objects(name) == {classes.index(c): list(map(float, box)) for c, box in OBJECTS}
    results = precision(name, classes, tmp_path / "out")
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results.get("voc", {"AP50": 100})["AP50"] == pytest.approx(100)


def test_objects_of_other_classes_are_left_out_where_one_says_so(name, tmp_path):
    classes = ["emu", "dog", "cat"]
    with pytest.raises(InputError, match="emu, dog, cat.*cat, cow, dog.*TRUST_CLASSES"):
        match_classes(name, classes, "model.pth")
    match_classes(name, classes, "model.pth", leave_out=True)
    assert MetadataCatalog.get(name).thing_classes == classes
    assert objects(name) == {1: [10, 10, 30, 30], 2: [40, 4, 60, 28]}
    results = precision(name, classes, tmp_path / "out")
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert "AP-cow" not in results["bbox"]
    assert results.get("voc", {"AP50": 100})["AP50"] == pytest.approx(100)


def test_no_class_in_common_is_refused_whatever_one_says(name):
    with pytest.raises(InputError, match="model.pth has the classes emu"):
        match_classes(name, ["emu"], "model.pth", leave_out=True)
