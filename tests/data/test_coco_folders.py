"""Where the images of a COCO file are looked for, and what may mean two folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from coco_files import HEIGHT, WIDTH, two_images
from iou_d2.data.coco import register_coco
from iou_d2.errors import InputError


@pytest.fixture
def data() -> dict:
    return two_images()


def layout(
    tmp_path, data, *folders: str, json_file: str = "annotations/instances_val.json"
) -> Path:
    """The annotations, and the images in each of `folders`."""
    (tmp_path / json_file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / json_file).write_text(json.dumps(data))
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for image in data["images"]:
            Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / folder / image["file_name"])
    return tmp_path / json_file


@pytest.mark.parametrize(
    ("json_file", "folders", "chosen"),
    [
        ("annotations/instances_val.json", ["images", "val", "."], "val"),
        ("annotations/instances_val.json", ["images", "images/val"], "images/val"),
        ("annotations/instances_val.json", ["images", "train"], "images"),
        ("annotations/instances_val.json", ["annotations/images", "val"], "annotations/images"),
        ("val.json", ["images", "val", "."], "val"),
        ("val.json", ["images", "."], "images"),
        ("train/_annotations.coco.json", ["train", "images", "valid"], "train"),
    ],
)
def test_the_folder_that_is_named_as_the_split_goes_first(
    tmp_path, data, json_file, folders, chosen
):
    file = layout(tmp_path, data, *folders, json_file=json_file)
    assert register_coco(file, None, tmp_path / "clean") == f"coco:{file}:{tmp_path / chosen}"


@pytest.mark.parametrize("folders", [["images/val", "val"], ["images", "."]])
def test_two_folders_that_may_be_meant_are_refused_with_both(tmp_path, data, folders):
    file = layout(tmp_path, data, *folders)
    one, other = (str(tmp_path / folder) for folder in folders)
    with pytest.raises(InputError, match=r"both hold a\.png: name the folder") as error:
        register_coco(file, None, tmp_path / "clean")
    message = str(error.value)
    assert one in message and message.endswith(f" coco:{file}:{other}.")
    name = f"coco:{file}:{other}"
    assert register_coco(file, tmp_path / folders[1], tmp_path / "clean") == name


def test_a_folder_and_a_link_to_it_are_one(tmp_path, data):
    file = layout(tmp_path, data, "images/val")
    (tmp_path / "val").symlink_to(tmp_path / "images" / "val")
    name = register_coco(file, None, tmp_path / "clean")
    assert name == f"coco:{file}:{tmp_path / 'images' / 'val'}"
