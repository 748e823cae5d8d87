"""Datasets named in a config: forms, absolute names, nearest names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from iou_d2.data.classes import classes_of
from iou_d2.data.register import register_dataset


@pytest.fixture(autouse=True)
def own_catalogs(monkeypatch):
    """What a test registers, shapes under a passing folder above all, is forgotten after it."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


def write_coco(folder: Path, categories: dict[int, str]) -> Path:
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images" / "a.png")
    data = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
    }
    (folder / "train.json").write_text(json.dumps(data))
    return folder / "train.json"


def write_voc(folder: Path) -> None:
    for part in ("Annotations", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "JPEGImages" / "a.jpg")
    (folder / "Annotations" / "a.xml").write_text(
        "<annotation><size><width>8</width><height>8</height></size><object><name>cat</name>"
        "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>8</xmax><ymax>8</ymax></bndbox></object>"
        "</annotation>"
    )


@pytest.mark.parametrize("form", ["coco:set/train.json", "coco:set/../set/train.json:set/images"])
def test_relative_paths_become_absolute(tmp_path, monkeypatch, form):
    file = write_coco(tmp_path / "set", {1: "cat"})
    monkeypatch.chdir(tmp_path)
    name = register_dataset(form, "clean")
    assert name == f"coco:{file}:{file.parent / 'images'}"
    monkeypatch.chdir("/")
    assert register_dataset(name, tmp_path) == name
    assert len(DatasetCatalog.get(name)) == 1


def test_home_folder(tmp_path, monkeypatch):
    file = write_coco(tmp_path / "set", {1: "cat"})
    monkeypatch.setenv("HOME", str(tmp_path))
    name = register_dataset("coco:~/set/train.json:~/set/images", tmp_path)
    assert name == f"coco:{file}:{file.parent / 'images'}"


def test_voc_folder(tmp_path, monkeypatch):
    write_voc(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    name = register_dataset("voc:pets", "clean")
    assert name == f"voc:{tmp_path / 'pets'}"
    assert classes_of(name) == ["cat"]
    assert Path(MetadataCatalog.get(name).dirname).parent == tmp_path / "clean"


@pytest.mark.parametrize("name", ["coco:", "coco::", "coco:a:b:c", "voc:", "voc:a:", "voc::train"])
def test_malformed_names(tmp_path, name):
    with pytest.raises(ValueError, match=f"'{name}' is no dataset: write coco:ANNOTATIONS.json"):
        register_dataset(name, tmp_path)


@pytest.mark.parametrize(
    "name", ["coco_2017_train", "coco_2017_val", "voc_2007_trainval", "voc_2012_val"]
)
def test_built_in_names_stay(tmp_path, name):
    assert register_dataset(name, tmp_path) == name
    assert len(classes_of(name)) == (80 if "coco" in name else 20)


@pytest.mark.parametrize("name", ["shapes_train", "shapes_val", "shapes_train_12x64"])
def test_shapes_names_are_registered_without_making_them(tmp_path, monkeypatch, name):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert register_dataset(name, tmp_path / "clean") == name
    assert len(classes_of(name)) > 1
    assert not list(tmp_path.iterdir())


def test_unknown_name_gives_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="no dataset 'coco_2017_trian'.*mean coco_2017_train") as e:
        register_dataset("coco_2017_trian", tmp_path)
    assert "coco:ANNOTATIONS.json" in str(e.value)
    with pytest.raises(ValueError, match="no dataset 'x'. Data of your own"):
        register_dataset("x", tmp_path)


def test_errors_of_the_files_come_through(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.json"):
        register_dataset(f"coco:{tmp_path}/absent.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="not a Pascal VOC folder"):
        register_dataset(f"voc:{tmp_path}:train", tmp_path)
