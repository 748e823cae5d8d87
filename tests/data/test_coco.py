"""A user's COCO JSON: each fault is named by file and record; training and evaluation agree."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from coco_files import (
    average_precision,
    perfect_predictions,
    two_images,
    write,
)
from iou_d2.data.coco import read_coco, register_coco


@pytest.fixture
def data() -> dict:
    return two_images()


def test_good_data_is_read_as_it_is(tmp_path, data):
    file = write(tmp_path, data)
    name = register_coco(file, None, tmp_path / "clean")
    assert name == f"coco:{file}:{tmp_path / 'images'}"
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {5: 0, 9: 1}
    assert metadata.json_file == str(file) and metadata.evaluator_type == "coco"
    assert not (tmp_path / "clean").exists()
    first, second = DatasetCatalog.get(name)
    assert first["file_name"] == str(tmp_path / "images" / "a.png") and first["image_id"] == 1
    assert first["annotations"][0]["bbox"] == [4, 4, 20, 20]
    assert [a["category_id"] for a in second["annotations"]] == [1]
    assert average_precision(name, tmp_path, perfect_predictions(name)) == pytest.approx(100)


def test_registering_twice_gives_the_same_name(tmp_path, data):
    file = write(tmp_path, data)
    name = register_coco(file, None, tmp_path)
    assert register_coco(file, tmp_path / "images", tmp_path) == name


@pytest.mark.parametrize("folder", ["images", "."])
def test_a_registered_file_is_not_read_again(tmp_path, data, folder):
    file = write(tmp_path, data)
    if folder == ".":
        for image in (tmp_path / "images").iterdir():
            image.rename(tmp_path / image.name)
        (tmp_path / "images").rmdir()
    name = register_coco(file, None, tmp_path)
    file.write_text("no JSON")
    assert register_coco(file, None, tmp_path) == name
    assert register_coco(file, tmp_path / folder, tmp_path) == name


def test_images_that_came_later_are_found_before_those_beside_the_file(tmp_path, data):
    file = write(tmp_path, data)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    for image in (tmp_path / "elsewhere").iterdir():
        (tmp_path / image.name).write_bytes(image.read_bytes())
    assert register_coco(file, None, tmp_path) == f"coco:{file}:{tmp_path}"
    (tmp_path / "images").mkdir()
    assert register_coco(file, None, tmp_path) == f"coco:{file}:{tmp_path}"
    (tmp_path / "images").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    assert register_coco(file, None, tmp_path) == f"coco:{file}:{tmp_path / 'images'}"


def test_unused_categories_are_kept(tmp_path, data):
    data["annotations"] = []
    name = register_coco(write(tmp_path, data), None, tmp_path)
    assert MetadataCatalog.get(name).thing_classes == ["cat", "dog"]
    assert [record["annotations"] for record in DatasetCatalog.get(name)] == [[], []]


def test_images_beside_the_json(tmp_path, data):
    file = write(tmp_path, data)
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).rename(tmp_path / name)
    assert register_coco(file, None, tmp_path) == f"coco:{file}:{tmp_path}"


def test_file_names_with_folders(tmp_path, data):
    data["images"][0]["file_name"] = "images/a.png"
    data["images"][1]["file_name"] = str(tmp_path / "images" / "b.png")
    name = register_coco(write(tmp_path, data), None, tmp_path)
    assert name.endswith(f":{tmp_path}")
    assert all(Path(record["file_name"]).is_file() for record in DatasetCatalog.get(name))


ODD = [None, True, -1, 0, 3, 0.5, math.nan, 1e300, 10**400, "", "x", [], [1], [[1]], {}, {"a": 1}]


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of keys and indices to everything inside `value`."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], (*path, key))


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:9])
def test_an_odd_value_anywhere_is_named_or_harmless(tmp_path, data, odd):
    """Either a sentence with the file's name, or data that Detectron2 reads and evaluates."""
    data["annotations"][0]["segmentation"] = [[4, 4, 24, 4, 24, 24]]
    write(tmp_path, data)
    accepted = 0
    for number, (*path, key) in enumerate(places(data)):
        changed = copy.deepcopy(data)
        target = changed
        for step in path:
            target = target[step]
        target[key] = copy.deepcopy(odd)
        file = tmp_path / f"changed{number}.json"
        file.write_text(json.dumps(changed))
        try:
            name = register_coco(file, None, tmp_path / "clean")
        except (ValueError, FileNotFoundError) as error:
            assert file.name in str(error)
            continue
        accepted += 1
        result = average_precision(name, tmp_path, perfect_predictions(name))
        assert result == pytest.approx(100) or math.isnan(result)
    assert accepted >= 4


def test_missing_json(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no annotation file .*absent\.json"):
        register_coco(tmp_path / "absent.json", None, tmp_path)
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        register_coco(tmp_path, None, tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 100, 200, -1])
def test_truncated_json_names_file_and_place(tmp_path, data, keep):
    file = write(tmp_path, data)
    file.write_text(file.read_text()[:keep])
    with pytest.raises(ValueError, match=r"train\.json is not valid JSON: .* line 1, column \d+"):
        read_coco(file)


def test_json_cut_between_values_is_called_cut(tmp_path, data):
    file = write(tmp_path, data)
    file.write_text(file.read_text()[:-1])
    with pytest.raises(ValueError, match=r"character \d+ of \d+\). Is the file cut short\?"):
        read_coco(file)


def test_broken_json_names_the_line(tmp_path):
    file = tmp_path / "train.json"
    file.write_text('{"images": [],\n "annotations" []}')
    with pytest.raises(ValueError, match=r"train\.json .* line 2, column 16 \(character 30") as e:
        read_coco(file)
    assert "cut short" not in str(e.value)


def test_json_that_is_not_text(tmp_path):
    file = tmp_path / "train.json"
    file.write_bytes(b'{"images": "\xff\xfe"}')
    with pytest.raises(ValueError, match=r"train\.json is not UTF-8 text"):
        read_coco(file)


def test_file_of_detections_is_not_annotations(tmp_path):
    with pytest.raises(ValueError, match=r"train\.json holds a list, .* file of detections\?"):
        read_coco(write(tmp_path, [{"image_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]))


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, {}])
def test_missing_lists(tmp_path, data, key, value):
    data[key] = value
    with pytest.raises(ValueError, match=rf"train\.json is not a COCO .* no list '{key}'"):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize("key", ["images", "categories"])
def test_empty_lists(tmp_path, data, key):
    data[key] = []
    with pytest.raises(ValueError, match=rf"train\.json lists no {key}"):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize("kind", ["images", "categories"])
def test_duplicate_ids(tmp_path, data, kind):
    data[kind].append({**data[kind][0]})
    shared = data[kind][0]["id"]
    with pytest.raises(
        ValueError, match=rf"train\.json: {kind}\[0\] and {kind}\[2\] .* same id {shared}\."
    ):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize("kind", ["images", "categories"])
@pytest.mark.parametrize("bad", [{}, {"id": "a"}, {"id": 1.5}, {"id": True}, {"id": None}, 3, None])
def test_ids_must_be_integers(tmp_path, data, kind, bad):
    data[kind].append(bad)
    with pytest.raises(ValueError, match=rf"train\.json: {kind}\[2\] has no integer id"):
        read_coco(write(tmp_path, data))


def test_duplicate_category_names(tmp_path, data):
    data["categories"].append({"id": 11, "name": "dog"})
    match = r"categories\[0\] \(id 9\) and categories\[2\] \(id 11\) have the same name 'dog'"
    with pytest.raises(ValueError, match=match):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize("name", [None, "", 3.5, "\ud800", []])
def test_category_without_name(tmp_path, data, name):
    data["categories"][1]["name"] = name
    with pytest.raises(ValueError, match=r"train\.json: categories\[1\] \(id 5\) has no name"):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize("key", ["width", "height"])
@pytest.mark.parametrize("value", [-3, 64.5, "64.5", math.nan, [], True])
def test_image_without_size(tmp_path, data, key, value):
    data["images"][1][key] = value
    with pytest.raises(ValueError, match=rf"train\.json: images\[1\] \(id 7\) needs a {key}"):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize("value", [None, "", 3])
def test_image_without_file_name(tmp_path, data, value):
    data["images"][1]["file_name"] = value
    with pytest.raises(ValueError, match=r"train\.json: images\[1\] \(id 7\) has no file_name"):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("image_id", 99, "has image_id 99, which is not among the images"),
        ("image_id", None, "has image_id None"),
        ("image_id", [1], r"has image_id \[1\]"),
        ("category_id", 1, "has category_id 1, which is not among the categories"),
        ("category_id", {}, "has category_id {}"),
        ("bbox", None, "needs a bbox of four finite numbers"),
        ("bbox", [], r"not \[\]"),
        ("bbox", [1, 2, 3], r"not \[1, 2, 3\]"),
        ("bbox", [1, 2, 3, 4, 5], "needs a bbox"),
        ("bbox", [1, 2, "3_0", 4], "needs a bbox"),
        ("bbox", [1, 2, None, 4], "needs a bbox"),
        ("bbox", [1, 2, math.nan, 4], "needs a bbox"),
        ("bbox", [math.inf, 2, 3, 4], "needs a bbox"),
        ("bbox", [10**400, 2, 3, 4], "needs a bbox"),
        ("iscrowd", 2, "needs an iscrowd of 0 or 1, not 2"),
        ("iscrowd", "x", "needs an iscrowd of 0 or 1, not 'x'"),
        ("ignore", 1, "is marked 'ignore'"),
    ],
)
def test_unusable_annotation(tmp_path, data, key, value, sentence):
    data["annotations"][1][key] = value
    with pytest.raises(ValueError, match=rf"train\.json: annotations\[1\] \(id 2\) .*{sentence}"):
        read_coco(write(tmp_path, data))


@pytest.mark.parametrize("bad", [None, 4, "box", [1, 2]])
def test_annotation_that_is_no_dict(tmp_path, data, bad):
    data["annotations"].append(bad)
    with pytest.raises(ValueError, match=r"train\.json: annotations\[2\] is not a dict"):
        read_coco(write(tmp_path, data))


def test_annotation_with_a_list_as_id(tmp_path, data):
    data["annotations"][1]["id"] = [2]
    with pytest.raises(ValueError, match=r"annotations\[1\] .* has the id \[2\]"):
        read_coco(write(tmp_path, data))


def test_missing_images_are_counted_and_three_are_named(tmp_path, data):
    data["images"] += [
        {"id": 100 + i, "file_name": f"gone{i}.png", "width": 8, "height": 8} for i in range(5)
    ]
    file = write(tmp_path, data)
    with pytest.raises(FileNotFoundError, match=r"^5 of the 7 images that .*train\.json") as error:
        register_coco(file, None, tmp_path)
    assert [f"gone{i}.png" in str(error.value) for i in range(5)] == [True] * 3 + [False] * 2
    assert not any(str(tmp_path) in name for name in DatasetCatalog.list())


def test_no_image_folder_names_both_places(tmp_path, data):
    file = write(tmp_path, data, images=())
    with pytest.raises(FileNotFoundError, match=r"train\.json, a\.png, is neither in .*images nor"):
        register_coco(file, None, tmp_path)
