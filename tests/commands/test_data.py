"""`iou-d2 data check`: what it tells, what it refuses, and its picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from coco_files import HEIGHT, WIDTH, annotation, two_images, write
from iou_d2.commands import contact_sheet, data_report
from iou_d2.commands.data import main
from iou_d2.commands.drawing import color_of
from iou_d2.errors import InputError, MissingFileError

CONFIG = ("--config", "quick/retinanet_own_data")


@pytest.fixture
def check(tmp_path, capsys):
    """A function: names of datasets and options -> exit status and what was printed."""

    def run(*arguments: str, config: tuple[str, ...] = CONFIG) -> tuple[int, str]:
        status = 0
        try:
            main(["check", *arguments, "--output", str(tmp_path / "out"), *config])
        except SystemExit as exit_:
            status = exit_.code
        return status, capsys.readouterr().out

    return run


def name_of(folder: Path, data: dict) -> str:
    folder.mkdir(exist_ok=True)
    return f"coco:{write(folder, data)}"


def with_categories(*names: str) -> dict:
    data = two_images()
    data["categories"] = [{"id": id_, "name": name} for id_, name in zip((9, 5, 7), names)]
    return data


def test_a_good_set_is_described_and_drawn(tmp_path, check):
    status, out = check(name_of(tmp_path, two_images()))
    assert status == 0
    assert "Nothing had to be mended.\n2 images, 2 objects of 2 classes, 0 crowds, 0 images" in out
    assert "2 small, 0 medium, 0 large" in out
    assert "quick/retinanet_own_data" in out and "IoU >= 0.5, %" in out
    assert out.endswith("Nothing is refused.\n")
    # Two images with the boxes' colours in them.
    picture = np.asarray(Image.open(tmp_path / "out" / "pictures.png"))
    assert picture.shape == (480, 960, 3)
    for column in (0, 480):
        colors = picture[:390, column : column + 470].reshape(-1, 3)
        assert (colors != 0).any(axis=1).any()


def test_what_was_mended_is_counted(tmp_path, check):
    data = two_images()
    data["annotations"] += [
        annotation(1, [50, 10, 40, 10]),  # an id that there is; over the right edge
        annotation(4, [5, 5, 0, 9]),
    ]
    status, out = check(name_of(tmp_path, data))
    assert status == 0
    (line,) = [line for line in out.splitlines() if line.startswith("Mended: ")]
    assert "1 boxes were clipped" in line and "1 boxes without area were dropped" in line
    assert "3 objects of 2 classes" in out


@pytest.mark.parametrize("crowds", [True, False])
def test_a_set_without_an_object_is_refused(tmp_path, check, crowds):
    data = two_images()
    for one in data["annotations"]:
        one["iscrowd"] = 1
    if not crowds:
        data["annotations"] = []
    status, out = check(name_of(tmp_path, data))
    assert status == 1
    assert "Refused: There is not one object to learn in the 2 images" in out
    assert (tmp_path / "out" / "pictures.png").is_file()


def test_a_test_set_that_gives_no_annotations_is_none_of_that(tmp_path, check):
    data = two_images()
    del data["annotations"]
    status, out = check(name_of(tmp_path, data))
    assert status == 0
    assert "AP is left out" in out and "Classes: cat, dog." in out


def test_bad_images_are_refused_by_the_check_of_the_training(tmp_path, check):
    name = name_of(tmp_path, two_images())
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    status, out = check(name)
    assert status == 1
    assert "2 of the 2 images of coco:" in out and "the sides are swapped" in out
    assert "2 objects of 2 classes" in out  # described all the same


def test_several_refusals_do_not_hide_a_good_set(tmp_path, check):
    good = name_of(tmp_path, two_images())
    status, out = check(good, "coco:nowhere.json", "shapes_of_nothing")
    assert status == 1
    assert "Refused: There is no annotation file" in out
    assert "Refused: 'shapes_of_nothing' is not a name of a shapes dataset" in out
    assert "2 images, 2 objects" in out
    assert out.endswith("Refused: coco:nowhere.json, shapes_of_nothing.\n")


def test_trust_is_handed_to_the_readers_and_named(tmp_path, check):
    data = two_images()
    data["annotations"] = [annotation(i, [0.1, 0.1, 0.5, 0.5]) for i in range(1, 13)]
    name = name_of(tmp_path, data)
    status, out = check(name)
    assert status == 1
    assert "Here that is --trust-boxes." in out
    status, out = check(name, "--trust-boxes")
    assert status == 0
    assert "12 objects of 2 classes" in out
    assert "Look at this: 12 of 12 objects have a side under one pixel." in out


def test_an_image_outside_of_its_folder_needs_trust(tmp_path, check):
    folder = tmp_path / "set"
    name = f"{name_of(folder, two_images())}:{folder / 'images'}"
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "outside.png")
    data = two_images()
    data["images"][0]["file_name"] = "../../outside.png"
    (folder / "train.json").write_text(json.dumps(data))
    assert "Here that is --trust-paths." in check(name)[1]
    assert check(name, "--trust-paths")[0] == 0


@pytest.mark.parametrize(
    ("second", "sentences"),
    [
        (("dog", "cat"), ["have the same classes."]),
        (
            ("dog", "fox"),
            [
                "only in the first: cat; only in the second: fox",
                "does not know fox",
                "TRUST_CLASSES",
            ],
        ),
        (("a", "b"), ["Neither can test a model of the other."]),
        (("dog", "cat", "fox"), ["only in the second: fox", "can be tested on"]),
        (("Dog ", "cat"), ["are these one class? 'dog', 'Dog '"]),
    ],
)
def test_sets_are_compared_by_their_classes(tmp_path, check, second, sentences):
    names = [name_of(tmp_path / "one", two_images())]
    names.append(name_of(tmp_path / "two", with_categories(*second)))
    status, out = check(*names)
    assert status == 0
    for sentence in sentences:
        assert sentence in out
    # The black images are all alike.
    assert "are in coco:" in out and "Do not train on what you test on." in out


def test_a_group_that_only_one_set_uses_is_a_class_of_both(tmp_path, check):
    data = two_images()
    data["categories"] = [
        {"id": 9, "name": "dog", "supercategory": "none"},
        {"id": 5, "name": "cat", "supercategory": "dog"},
    ]
    names = [name_of(tmp_path / "one", data)]
    data["annotations"] = data["annotations"][:1]  # a cat
    names.append(name_of(tmp_path / "two", data))
    assert f"{names[0]} and {names[1]} have the same classes." in check(*names)[1]


def test_the_same_set_twice_is_read_once(tmp_path, check):
    name = name_of(tmp_path, two_images())
    status, out = check(name, f"{name}:{tmp_path / 'images'}")
    assert status == 0
    assert "It is the same as coco:" in out and "The sets together" not in out


def test_a_config_that_cannot_be_judged_is_left_out_with_a_word(tmp_path, check):
    crop = tmp_path / "crop.yaml"
    crop.write_text("INPUT: {CROP: {ENABLED: True, TYPE: relative_range}}\n")
    config = ("--config", str(crop), "quick/atss_shapes", "quick/unitbox_shapes")
    status, out = check(name_of(tmp_path, two_images()), config=config)
    assert status == 0
    assert f"Not judged: {crop}. INPUT.CROP.TYPE relative_range is not looked at" in out
    assert "quick/atss_shapes" in out and "cells of 8 pixels" in out


def test_a_config_that_is_not_there_ends_it_at_once(tmp_path, check):
    with pytest.raises(MissingFileError, match="no config file quick/retinanet_own_dat"):
        check("coco:nowhere.json", config=("--config", "quick/retinanet_own_dat"))


def test_an_output_that_is_a_file_is_refused(tmp_path, check):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is no folder"):
        check(name_of(tmp_path, two_images()))


def test_the_configs_that_come_with_iou_d2_are_all_judged():
    groups, unjudged = data_report._grouped(data_report.read_configs(None))
    assert not unjudged
    assert {type(matching).__name__ for _, matching in groups} == {
        "Anchors",
        "RangePoints",
        "NearestPoints",
        "Pixels",
    }


def record(file: Path, *boxes: tuple, width: int = WIDTH, height: int = HEIGHT) -> dict:
    objects = [{"bbox": list(b), "bbox_mode": 0, "category_id": 0} for b in boxes]  # XYXY
    return {"file_name": str(file), "width": width, "height": height, "annotations": objects}


def test_a_cell_has_the_box_where_the_object_is(tmp_path):
    file = tmp_path / "a.png"
    Image.new("RGB", (WIDTH, HEIGHT), (10, 20, 30)).save(file)
    cell = np.asarray(contact_sheet.draw_cell(record(file, (16, 12, 48, 36)), ["cat"]))
    scale = 428 / HEIGHT if 428 / HEIGHT < 472 / WIDTH else 472 / WIDTH
    color = (cell == np.array(color_of(0))).all(axis=2)
    inside = color[: round(HEIGHT * scale)]  # above the caption
    rows, columns = np.nonzero(inside)
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert edges == pytest.approx([scale * v for v in (16, 12, 48, 36)], abs=1.5)
    assert color[round(HEIGHT * scale) :].any()  # the class in the caption


def test_a_cell_says_what_is_wrong_with_its_image(tmp_path):
    bad, turned = tmp_path / "bad.jpg", tmp_path / "turned.png"
    bad.write_bytes(b"no image")
    Image.new("RGB", (HEIGHT, WIDTH)).save(turned)
    red = np.array(contact_sheet._RED)
    for file in (bad, turned):
        cell = np.asarray(contact_sheet.draw_cell(record(file, (1, 1, 9, 9)), ["cat"]))
        assert (cell == red).all(axis=2).sum() > 50
    good = tmp_path / "good.png"
    Image.new("RGB", (WIDTH, HEIGHT)).save(good)
    cell = np.asarray(contact_sheet.draw_cell(record(good), ["cat"]))
    assert not (cell == red).all(axis=2).any()


def test_odd_names_and_shapes_are_drawn(tmp_path):
    file = tmp_path / "тест.png"
    Image.new("L", (900, 1)).save(file)
    names = ["a class with a very long name " * 9, "猫\nx"]
    odd = record(file, (0, 0, 900, 1), (-5, -5, 2000, 3), width=900, height=1)
    odd["annotations"][1].update(category_id=1, iscrowd=1)
    assert contact_sheet.draw_cell(odd, names).size == (480, 480)


def test_a_sheet_has_twenty_images_those_with_objects_first(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        contact_sheet,
        "draw_cell",
        lambda record, names: drawn.append(record) or Image.new("RGB", (9, 9)),
    )
    MetadataCatalog.get("sheet_of_many").thing_classes = ["cat"]
    dicts = [record(tmp_path / "x.png", *[(0, 0, 1, 1)] * (i % 3 == 0)) for i in range(45)]
    contact_sheet.draw_sheet({"sheet_of_many": dicts}, tmp_path)
    assert [bool(one["annotations"]) for one in drawn] == [True] * 15 + [False] * 5


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ImportError("No module named 'lvis'"), "cannot be read: No module named 'lvis'"),
        (FileNotFoundError(2, "No such file", "x.json"), "is not there"),
    ],
)
def test_a_dataset_of_detectron2_that_is_not_there_is_refused(check, error, sentence):
    def fail():
        raise error

    name = f"of_detectron2_{type(error).__name__}"
    DatasetCatalog.register(name, fail)
    try:
        status, out = check(name)
    finally:
        DatasetCatalog.remove(name)
    assert status == 1
    assert f"Refused: The dataset {name} {sentence}" in out
