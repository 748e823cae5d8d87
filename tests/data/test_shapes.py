"""The generated dataset `shapes`: exact boxes, same bytes, what it holds, safe writing."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iou_d2.data import shapes
from iou_d2.data.shapes import ShapesSpec, ensure_shapes, parse_shapes_name, write_shapes
from iou_d2.data.shapes_image import CLASSES
from shapes_files import digests

# pycocotools with NumPy 2, for every mask it decodes.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PIXELS = 128
IMAGES = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shapes") / "set"
    write_shapes(ShapesSpec("train", IMAGES, PIXELS), path)
    return path


@pytest.fixture(scope="module")
def data(folder) -> dict:
    return json.loads((folder / "instances.json").read_text())


@pytest.fixture
def register(tmp_path, monkeypatch):
    """Register names under an empty root, and forget them again."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    names = []

    def register_name(name: str) -> bool:
        assert name not in DatasetCatalog.list(), f"{name} belongs to another test"
        names.append(name)
        return shapes.register_shapes_by_name(name)

    yield register_name
    for name in names:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def by_image(data: dict) -> list[list[dict]]:
    groups = {record["id"]: [] for record in data["images"]}
    for annotation in data["annotations"]:
        groups[annotation["image_id"]].append(annotation)
    return list(groups.values())


# ---------------------------------------------------------------------------- one image


# ---------------------------------------------------------------------------- the same bytes


def test_long_set_begins_with_short_set(folder, tmp_path):
    write_shapes(ShapesSpec("train", 3, PIXELS), tmp_path / "short")
    short, long = digests(tmp_path / "short"), digests(folder)
    names = [name for name in short if name.endswith(".png")]
    assert len(names) == 3 and all(short[name] == long[name] for name in names)


# ---------------------------------------------------------------------------- what it holds


def test_sizes_and_counts(data):
    singles = [a for a in data["annotations"] if not a["iscrowd"]]
    longer = np.array([max(a["bbox"][2:]) for a in singles]) / PIXELS
    pixel = 2 / PIXELS  # drawing rounds outwards
    assert longer.max() <= 1 / 2 + pixel and longer.max() > 0.4
    # Cut by the border an object may be shorter than 1/16, but it keeps half of its area.
    assert longer.min() >= 0.5 / 16 and np.quantile(longer, 0.02) >= 1 / 16 - pixel
    counts = [sum(not a["iscrowd"] for a in group) for group in by_image(data)]
    assert max(counts) <= 7 and 3 < np.mean(counts) < 6
    labels = np.bincount([a["category_id"] for a in singles], minlength=6)
    assert labels[0] == 0 and (labels[1:] > 0.12 * len(singles)).all()


def test_same_class_pairs_overlap(data):
    """Half of the images hold a pair with IoU 0.3 to 0.6, and no boxes overlap by more."""
    with_pair = 0
    for group in by_image(data):
        singles = [a for a in group if not a["iscrowd"]]
        boxes = np.array([a["bbox"] for a in singles], dtype=np.float64).reshape(-1, 4)
        ious = mask_util.iou(boxes, boxes, [0] * len(boxes)) if len(boxes) else np.zeros((0, 0))
        pairs = list(itertools.combinations(range(len(boxes)), 2))
        assert all(ious[i, j] <= 0.6 + 1e-9 for i, j in pairs)
        with_pair += any(
            ious[i, j] >= 0.3 and singles[i]["category_id"] == singles[j]["category_id"]
            for i, j in pairs
        )
    assert 0.5 <= with_pair / IMAGES <= 0.8


def test_empty_images_crowds_and_truncated_objects(data):
    groups = by_image(data)
    assert 0.015 <= np.mean([not group for group in groups]) <= 0.08
    crowds = [a for a in data["annotations"] if a["iscrowd"]]
    assert 0.03 <= len(crowds) / IMAGES <= 0.1
    parts = [cv2.connectedComponents(mask_util.decode(a["segmentation"]))[0] - 1 for a in crowds]
    assert min(parts) >= 5 and np.mean(parts) >= 8, "a crowd region is made of many objects"
    cut = [
        x == 0 or y == 0 or x + w == PIXELS or y + h == PIXELS
        for x, y, w, h in (a["bbox"] for a in data["annotations"])
    ]
    assert 0.03 <= np.mean(cut) <= 0.25


# ---------------------------------------------------------------------------- COCO


def test_json_is_valid_coco(folder, data):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "instances.json"))
    assert [c["name"] for c in data["categories"]] == list(CLASSES)
    assert [i["id"] for i in data["images"]] == list(range(1, IMAGES + 1))
    assert [a["id"] for a in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))
    assert len(list((folder / "images").iterdir())) == IMAGES
    for record in data["images"][:20]:
        image = cv2.imread(str(folder / "images" / record["file_name"]))
        assert image.shape == (record["height"], record["width"], 3) == (PIXELS, PIXELS, 3)
    for annotation in data["annotations"]:
        mask = coco.annToMask(annotation)
        assert annotation["bbox"] == mask_util.toBbox(annotation["segmentation"]).tolist()
        assert annotation["area"] == mask.sum() > 0


def test_ground_truth_as_detections_has_ap_one(folder, data):
    detections = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for a in data["annotations"]
        if not a["iscrowd"]
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "instances.json"))
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_detectron2_loads_it_at_first_use(register, tmp_path):
    name = "shapes_val_30x64"
    assert register(name) and not list(tmp_path.iterdir()), "registration makes no data"
    metadata = MetadataCatalog.get(name)
    assert metadata.evaluator_type == "coco" and metadata.thing_classes == list(CLASSES)
    dicts = DatasetCatalog.get(name)
    data = json.loads(Path(metadata.json_file).read_text())
    assert Path(metadata.json_file).is_relative_to(tmp_path)
    assert len(dicts) == 30 and all(Path(d["file_name"]).is_file() for d in dicts)
    assert [len(d["annotations"]) for d in dicts] == [len(g) for g in by_image(data)]
    loaded = [a for d in dicts for a in d["annotations"]]
    for mine, theirs in zip(data["annotations"], loaded):
        assert theirs["bbox"] == mine["bbox"] and theirs["iscrowd"] == mine["iscrowd"]
        assert theirs["category_id"] == mine["category_id"] - 1


def test_evaluator_works_before_the_loader_is_called(register, tmp_path):
    name = "shapes_val_3x64"
    register(name)
    ensure_shapes(name)
    COCOEvaluator(name, output_dir=str(tmp_path / "out"), use_fast_impl=False)


# ---------------------------------------------------------------------------- names


def test_names():
    assert parse_shapes_name("shapes_train") == ShapesSpec("train", 1000, 256, 0)
    assert parse_shapes_name("shapes_val") == ShapesSpec("val", 200, 256, 0)
    assert parse_shapes_name("shapes_val_5x64") == ShapesSpec("val", 5, 64, 0)


@pytest.mark.parametrize(
    "name",
    ["shapes_", "shapes_test", "shapes_train_", "shapes_train_5", "shapes_train_0x64",
     "shapes_train_5x063", "shapes_train_5x64\n", "shapes_val_-5x64", "shapes_val_5x64x3"],
)  # fmt: skip
def test_malformed_name_is_told(name):
    with pytest.raises(ValueError, match="is not a name of a shapes dataset: write"):
        shapes.register_shapes_by_name(name)
    assert name not in DatasetCatalog.list()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("test", 5, 64, 0), "split"),
        (("val", 0, 64, 0), "at least 1 image"),
        (("val", 5, 63, 0), "64 to 4096 pixels"),
        (("val", 5, 4097, 0), "64 to 4096 pixels"),
        (("val", 5, 64, -1), "seed"),
    ],
)
def test_values_out_of_range_are_told(values, message):
    with pytest.raises(ValueError, match=message):
        ShapesSpec(*values)


def test_other_names_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shapes.register_shapes_by_name("coco_2017_train") is False
    ensure_shapes("coco_2017_train")
    ensure_shapes("shapes_of_my_own")
    assert not list(tmp_path.iterdir())


def test_base_names_register_once():
    shapes.register_shapes()
    shapes.register_shapes()
    assert {"shapes_train", "shapes_val"} <= set(DatasetCatalog.list())


# ---------------------------------------------------------------------------- safe writing
