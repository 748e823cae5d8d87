"""A user's YOLO folder: boxes by closed form, faults by file and line, nothing outside is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools.coco import COCO

from iou_d2.data.cleaning import NO_TRUST, Trust
from iou_d2.data.register import register_dataset
from iou_d2.errors import InputError

WIDTH, HEIGHT = 80, 40


@pytest.fixture
def folder(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / "set" / part / "train").mkdir(parents=True)
    for stem in ("a", "b"):
        file = tmp_path / "set" / "images" / "train" / f"{stem}.jpg"
        Image.new("RGB", (WIDTH, HEIGHT)).save(file)
    write_labels(tmp_path / "set", "0 0.5 0.5 0.25 0.5\n")
    write_yaml(tmp_path / "set")
    return tmp_path / "set"


def write_labels(folder, text: str) -> None:
    (folder / "labels" / "train" / "a.txt").write_bytes(text.encode())


def write_yaml(folder, **changes) -> None:
    data = {"path": ".", "train": "images/train", "nc": 2, "names": ["cat", "dog"], **changes}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))


def register(folder, trust: Trust = NO_TRUST, split: str = "train") -> str:
    return register_dataset(f"yolo:{folder / 'data.yaml'}:{split}", folder / "clean", trust)


def boxes(name: str) -> list:
    return [[a["bbox"] for a in record["annotations"]] for record in DatasetCatalog.get(name)]


def test_boxes_and_evaluation_file(folder):
    name = register(folder)
    assert boxes(name) == [[[30, 10, 50, 30]], []]
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["cat", "dog"] and metadata.evaluator_type == "coco"
    assert COCO(metadata.json_file).anns[1]["bbox"] == [30, 10, 20, 20]
    assert "1 images without a label file" in str(metadata.findings)
    assert "first: b.txt" in str(metadata.findings)


@pytest.mark.parametrize(
    "text",
    ["\ufeff0 0.5 0.5 0.25 0.5\r\n\r\n", "0.0 0.5 0.5 0.25 0.5", "0 .5 .5 .25 .5\n0 .5 .5 .25 .5"],
)
def test_what_has_one_meaning(folder, text):
    write_labels(folder, text)
    assert boxes(register(folder)) == [[[30, 10, 50, 30]], []]


def test_polygon_becomes_the_box_around_it(folder):
    write_labels(folder, "1 0.25 0.25 0.5 0.75 0.75 0.5")
    name = register(folder)
    assert boxes(name) == [[[20, 10, 60, 30]], []]
    assert "1 polygons" in str(MetadataCatalog.get(name).findings)


@pytest.mark.parametrize(
    "names", [{0: "cat", 1: "dog"}, {"0": "cat", "1": "dog"}, ["cat", " dog "]]
)
def test_names(folder, names):
    write_yaml(folder, names=names)
    assert MetadataCatalog.get(register(folder)).thing_classes == ["cat", "dog"]


@pytest.mark.parametrize("train", ["../images/train", ["images/train"], "list.txt"])
def test_forms_of_a_split(folder, train):
    (folder / "list.txt").write_text("./images/train/a.jpg\r\nimages/train/b.jpg\r\n")
    write_yaml(folder, train=train)
    assert len(boxes(register(folder))) == 2


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("2 .5 .5 .2 .2", "the class 2 is none of the 2"),
        ("-1 .5 .5 .2 .2", "the class -1 is none"),
        ("0.5 .5 .5 .2 .2", "the class 0.5 is none"),
        ("cat .5 .5 .2 .2", "'cat' is no number"),
        ("0 nan .5 .2 .2", "'nan' is no number"),
        ("0 40 20 10 10", "40 is no fraction"),
        ("0 .5 .5 .2", "has 4 numbers"),
        ("0 .5 .5 .2 .2 .9", "has 6 numbers.*a detection with its score"),
    ],
)
def test_bad_lines(folder, line, sentence):
    write_labels(folder, f"0 .5 .5 .2 .2\n{line}\n")
    with pytest.raises(InputError, match=rf"a\.txt, line 2.*{sentence}"):
        register(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[", "a: !!python/object/apply:os.system ['true']", "[" * 100_000, "names: [a]", "\0"],
)
def test_bad_yaml(folder, text):
    (folder / "data.yaml").write_text(text)
    with pytest.raises(InputError, match=r"data\.yaml") as error:
        register(folder)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "changes",
    [{"nc": 3}, {"names": ["cat", "cat"]}, {"names": ["cat", False]}, {"names": {1: "a", 2: "b"}}],
)
def test_bad_names(folder, changes):
    write_yaml(folder, **changes)
    with pytest.raises(InputError, match=r"data\.yaml"):
        register(folder)


def test_paths_outside_need_trust(folder, tmp_path):
    (folder / "images").rename(tmp_path / "images")
    (folder / "labels").rename(tmp_path / "labels")
    write_yaml(folder, train="../images/train")
    with pytest.raises(InputError, match=r"outside of its folder.*DATASETS\.TRUST_PATHS"):
        register(folder)
    assert len(boxes(register(folder, Trust(paths=True)))) == 2


def test_images_and_labels_below_linked_folders_are_read_once(folder):
    for part, name, content in (("images", "c.jpg", None), ("labels", "c.txt", "1 .5 .5 .25 .5")):
        (folder / "pool" / part).mkdir(parents=True)
        file = folder / "pool" / part / name
        file.write_text(content) if content else Image.new("RGB", (WIDTH, HEIGHT)).save(file)
        (folder / part / "train" / "more").symlink_to(folder / "pool" / part)
    (folder / "images" / "train" / "once_more").symlink_to(folder / "pool" / "images")
    (folder / "pool" / "images" / "circle").symlink_to(folder / "images")
    (folder / "images" / "train" / "circle").symlink_to("..", target_is_directory=True)
    (folder / "images" / "train" / "itself").symlink_to(".", target_is_directory=True)
    name = register(folder)
    files = [Path(record["file_name"]) for record in DatasetCatalog.get(name)]
    assert [file.name for file in files] == ["a.jpg", "b.jpg", "c.jpg"]
    assert boxes(name) == [[[30, 10, 50, 30]], [], [[30, 10, 50, 30]]]


@pytest.mark.parametrize("part", ["images", "labels", "images/train/more", "labels/train"])
def test_linked_folders_outside_need_trust(folder, tmp_path, part):
    if part.endswith("more"):
        (folder / "images" / "train" / "more").mkdir()
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / "train" / "more" / "c.jpg")
    (folder / part).rename(tmp_path / "outside")
    (folder / part).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match=r"outside.*outside of its folder.*DATASETS\.TRUST_PATHS"):
        register(folder)
    found = boxes(register(folder, Trust(paths=True)))
    assert [[30, 10, 50, 30]] in found and len(found) == (3 if part.endswith("more") else 2)


def test_missing_split_and_labels(folder):
    with pytest.raises(InputError, match="no 'val'; the splits there are train"):
        register(folder, split="val")
    (folder / "labels" / "train" / "a.txt").unlink()
    with pytest.raises(InputError, match="no label file"):
        register(folder)


def test_windows_path_in_a_name(tmp_path):
    with pytest.raises(InputError, match="Windows"):
        register_dataset(r"coco:C:\data\ann.json", tmp_path)


def test_indices_are_those_of_the_classes_at_loading(folder):
    name = register(folder)
    metadata = MetadataCatalog.get(name)
    del metadata.thing_classes
    metadata.thing_classes = ["dog", "cat"]
    assert DatasetCatalog.get(name)[0]["annotations"][0]["category_id"] == 1
