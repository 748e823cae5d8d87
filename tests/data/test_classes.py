"""Classes of datasets and models are matched by name, whatever their order and ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from iou_d2.data.classes import (
    classes_of,
    match_classes,
    require_objects,
    training_classes,
)
from iou_d2.data.register import register_dataset
from iou_d2.errors import InputError


@pytest.fixture(autouse=True)
def own_catalogs(monkeypatch):
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


def coco(folder: Path, categories: dict[int, str], group: dict | None = None, **fields) -> str:
    """A registered set with one object of each category, in the order of the categories; `group`
    is one more, without an object."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "images" / "a.png")
    annotations = [
        {"id": n, "image_id": 1, "category_id": i, "bbox": [n, n, 20, 20], **fields}
        for n, i in enumerate(categories, 1)
    ]
    data = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
        "annotations": [{"area": 400, "iscrowd": 0, **a} for a in annotations],
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
    }
    if group is not None:
        data["categories"] = [c | {"supercategory": group["name"]} for c in data["categories"]]
        data["categories"].append(group)
    (folder / "a.json").write_text(json.dumps(data))
    return register_dataset(f"coco:{folder}/a.json", folder / "clean")


def voc(folder: Path, names: list[str]) -> str:
    for part in ("Annotations", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "JPEGImages" / "a.jpg")
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{n}</xmin><ymin>{n}</ymin>"
        f"<xmax>{n + 20}</xmax><ymax>{n + 20}</ymax></bndbox></object>"
        for n, name in enumerate(names, 1)
    )
    (folder / "Annotations" / "a.xml").write_text(
        f"<annotation><size><width>64</width><height>64</height></size>{objects}</annotation>"
    )
    return register_dataset(f"voc:{folder}", folder / "clean")


def names_in(name: str) -> list[str]:
    """The names of the objects as training sees them, in the order of the file."""
    classes = MetadataCatalog.get(name).thing_classes
    return [classes[a["category_id"]] for r in DatasetCatalog.get(name) for a in r["annotations"]]


def test_sets_with_the_same_names_and_other_ids_agree(tmp_path):
    first = coco(tmp_path / "a", {1: "cat", 2: "dog"})
    second = coco(tmp_path / "b", {3: "dog", 8: "cat"})
    classes = training_classes([first, second])
    assert classes == ["cat", "dog"]
    for name in (first, second):
        match_classes(name, classes, "DATASETS.TRAIN")
    assert names_in(first) == ["cat", "dog"] and names_in(second) == ["dog", "cat"]
    indices = [a["category_id"] for a in DatasetCatalog.get(second)[0]["annotations"]]
    assert indices == [1, 0]
    assert MetadataCatalog.get(second).thing_dataset_id_to_contiguous_id == {3: 1, 8: 0}


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({1: "cat"}, "differ: only in the first: dog"),
        ({1: "cat", 2: "dog", 3: "cow"}, "differ: only in the second: cow"),
        ({1: "cat", 2: "Dog"}, "only in the first: dog; only in the second: Dog"),
    ],
)
def test_training_sets_with_other_classes_name_both_and_the_difference(tmp_path, other, sentence):
    names = [coco(tmp_path / "a", {1: "cat", 2: "dog"}), coco(tmp_path / "b", other)]
    with pytest.raises(InputError, match=sentence) as error:
        training_classes(names)
    assert all(name in str(error.value) for name in names)


def test_unlike_training_sets_are_joined_where_asked(tmp_path):
    names = [coco(tmp_path / "a", {1: "cat"}), coco(tmp_path / "b", {1: "cow", 2: "cat"})]
    assert training_classes(names, join=True) == ["cat", "cow"]


VEHICLE = {"id": 9, "name": "vehicle", "supercategory": "none"}


def test_an_unused_group_is_a_class_where_another_set_uses_it(tmp_path):
    cars = coco(tmp_path / "a", {1: "car"}, group=VEHICLE)
    both = coco(tmp_path / "b", {9: "vehicle", 1: "car"})
    assert classes_of(cars) == training_classes([cars]) == ["car"]
    assert training_classes([cars, both]) == training_classes([cars], tests=[both])
    assert training_classes([cars, both]) == ["car", "vehicle"]
    assert training_classes([both, cars]) == ["car", "vehicle"]
    for name in (cars, both):
        match_classes(name, ["vehicle", "car"], "DATASETS.TRAIN")
    assert names_in(cars) == ["car"] and names_in(both) == ["vehicle", "car"]
    with pytest.raises(InputError, match="differ: only in the second: boat"):
        training_classes([cars, coco(tmp_path / "c", {1: "car", 2: "boat"}, group=VEHICLE)])


def test_a_set_may_lack_classes_of_the_model(tmp_path):
    for name in (coco(tmp_path / "a", {5: "dog"}), voc(tmp_path / "b", ["dog"])):
        match_classes(name, ["cat", "dog", "cow"], "model.pth")
        assert names_in(name) == ["dog"]
        assert classes_of(name) == ["cat", "dog", "cow"]


def test_a_voc_folder_in_another_order(tmp_path):
    name = voc(tmp_path, ["cat", "dog", "cat"])
    match_classes(name, ["dog", "cat"], "model.pth")
    assert names_in(name) == ["cat", "dog", "cat"]
    assert [a["category_id"] for a in DatasetCatalog.get(name)[0]["annotations"]] == [1, 0, 1]


def test_unknown_classes_are_refused_with_both_lists_unless_left_out(tmp_path):
    name = coco(tmp_path, {1: "cat", 2: "horse"})
    with pytest.raises(InputError, match="model.pth has the classes cat, dog, but .* cat, horse"):
        match_classes(name, ["cat", "dog"], "model.pth")
    match_classes(name, ["cat", "dog"], "model.pth", leave_out=True)
    assert names_in(name) == ["cat"]


def test_a_set_without_any_class_of_the_model_is_always_refused(tmp_path):
    name = coco(tmp_path, {1: "horse"})
    with pytest.raises(InputError, match="has horse.$"):
        match_classes(name, ["cat"], "model.pth", leave_out=True)


def test_the_order_of_detectron2s_own_sets_cannot_change():
    classes = sorted(classes_of("coco_2017_val"))
    with pytest.raises(InputError, match="'coco_2017_val', whose order cannot be changed"):
        match_classes("coco_2017_val", classes, "model.pth")


def test_no_classes_and_no_names():
    with pytest.raises(InputError, match="'ade20k_sem_seg_val' has no object classes"):
        training_classes(["ade20k_sem_seg_val"])
    with pytest.raises(InputError, match="DATASETS.TRAIN is empty"):
        training_classes([])


def test_crowds_are_nothing_to_learn(tmp_path):
    crowds = coco(tmp_path / "a", {1: "cat"}, iscrowd=1)
    with pytest.raises(InputError, match="not one object to learn in the 1 images of coco:"):
        require_objects([crowds])
    require_objects([crowds, coco(tmp_path / "b", {1: "cat"})])
