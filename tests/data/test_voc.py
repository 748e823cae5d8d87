"""A user's VOC folder: each fault is named by file and object; evaluation sees the same boxes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from iou_d2.data.voc import register_voc
from voc_files import (
    HEIGHT,
    WIDTH,
    box_xml,
    object_xml,
    precision,
    write_image,
    write_pets,
    write_split,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_pets(tmp_path / "pets")


def test_strict_voc_is_read_as_it_is(folder, tmp_path):
    name = register_voc(folder, "train", tmp_path / "clean")
    assert name == f"voc:{folder}:train" == register_voc(folder, "train", tmp_path)
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["cat", "dog", "zebra"]
    assert (metadata.dirname, metadata.split, metadata.year) == (str(folder), "train", 2012)
    assert metadata.evaluator_type == "pascal_voc" and not (tmp_path / "clean").exists()
    difficult, first = DatasetCatalog.get(name)
    assert (difficult["image_id"], first["image_id"]) == ("b", "a")
    assert first["file_name"] == str(folder / "JPEGImages" / "a.jpg")
    assert (first["width"], first["height"]) == (WIDTH, HEIGHT)
    # One is taken off xmin and ymin alone: pixels 1 to 30 are 30 pixels.
    assert first["annotations"] == [
        {"category_id": 1, "bbox": [0, 0, 30, 20], "bbox_mode": BoxMode.XYXY_ABS},
        {"category_id": 0, "bbox": [10, 11, 63, 47], "bbox_mode": BoxMode.XYXY_ABS},
    ]


def test_splits_of_a_folder_have_the_same_classes(folder, tmp_path):
    names = [register_voc(folder, split, tmp_path) for split in ("train", "val")]
    first, second = (MetadataCatalog.get(name).thing_classes for name in names)
    assert first == second
    assert DatasetCatalog.get(names[1])[0]["annotations"][0]["category_id"] == 2


def test_year_of_the_folder(tmp_path):
    folder = tmp_path / "VOC2007"
    write_image(folder, "a", object_xml("dog", 1, 1, 30, 20))
    write_split(folder, "test", "a")
    assert MetadataCatalog.get(register_voc(folder, "test", tmp_path)).year == 2007


def test_folder_without_image_sets_is_taken_whole(tmp_path):
    folder = tmp_path / "pets"
    write_image(folder, "b", object_xml("dog", 1, 1, 30, 20))
    write_image(folder, "a", object_xml("cat", 1, 1, 30, 20))
    name = register_voc(folder, None, tmp_path / "clean")
    assert name == f"voc:{folder}"
    assert [record["image_id"] for record in DatasetCatalog.get(name)] == ["a", "b"]
    assert precision(name)["AP"] == pytest.approx(100)


def test_split_must_be_named_where_there_are_some(folder, tmp_path):
    with pytest.raises(ValueError, match=r"voc:.*pets:SPLIT; the splits there are train, val\."):
        register_voc(folder, None, tmp_path)


def test_missing_split(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Main/test\.txt; the splits there are train, val"):
        register_voc(folder, "test", tmp_path)


@pytest.mark.parametrize("part", ["Annotations", "JPEGImages"])
def test_missing_folder(folder, tmp_path, part):
    (folder / part).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"pets is not a Pascal VOC .* no {part}/"):
        register_voc(folder, "train", tmp_path)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_split(folder, tmp_path, text):
    write_split(folder, "train", text)
    with pytest.raises(ValueError, match=r"train\.txt lists no image"):
        register_voc(folder, "train", tmp_path)


def test_image_listed_twice(folder, tmp_path):
    write_split(folder, "train", "a\nb\na\n")
    with pytest.raises(ValueError, match=r"train\.txt lists the image a twice"):
        register_voc(folder, "train", tmp_path)


def test_missing_annotations_are_counted_and_named(folder, tmp_path):
    write_split(folder, "train", "a\nx1\nx2\nx3\nx4\n")
    match = r"4 of the 5 annotations that .*pets lists .*x1\.xml, .*x2\.xml, .*x3\.xml\.$"
    with pytest.raises(FileNotFoundError, match=match):
        register_voc(folder, "train", tmp_path)


def test_missing_image(folder, tmp_path):
    (folder / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 images .*JPEGImages/a\.jpg"):
        register_voc(folder, "train", tmp_path)


@pytest.mark.parametrize("text", ["", "<annotation><object></annotation>", "<annotation>", "\0"])
def test_malformed_xml(folder, tmp_path, text):
    (folder / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.xml is not well-formed XML: .*line 1"):
        register_voc(folder, "train", tmp_path)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ("<object></object>", "object 2 has no name"),
        ("<object><name> </name></object>", "object 2 has no name"),
        ("<object><name>cat</name></object>", r"object 2 \(cat\) has no bndbox"),
        (f"<object><name>cat</name>{box_xml(1, 2, 3)}</object>", "object 2 has no bndbox/ymax"),
        (object_xml("cat", 1, 2, 3, ""), "object 2 has no bndbox/ymax"),
        (object_xml("cat", 1, "two", 3, 4), "object 2 has the ymin 'two', which is no number"),
        (object_xml("cat", "nan", 2, 3, 4), "object 2 has the xmin 'nan'"),
        (object_xml("cat", 1, 2, "inf", 4), "object 2 has the xmax 'inf'"),
    ],
)
def test_unusable_object(folder, tmp_path, bad, sentence):
    write_image(folder, "a", object_xml("dog", 1, 1, 30, 20), bad)
    with pytest.raises(ValueError, match=rf"a\.xml: {sentence}"):
        register_voc(folder, "train", tmp_path)


@pytest.mark.parametrize(
    "size",
    [
        "<size><width>64.5</width><height>48</height></size>",
        "<size><width>-64</width><height>48</height></size>",
        f"<size><width>{'9' * 400}</width><height>48</height></size>",
    ],
)
def test_unusable_size(folder, tmp_path, size):
    write_image(folder, "a", size=size)
    with pytest.raises(ValueError, match=r"a\.xml needs a size in whole pixels"):
        register_voc(folder, "train", tmp_path)


def test_folder_without_objects(tmp_path):
    write_image(tmp_path / "pets", "a")
    with pytest.raises(ValueError, match="Annotations holds no XML file with an object"):
        register_voc(tmp_path / "pets", None, tmp_path)


def test_class_that_the_evaluator_cannot_write(folder, tmp_path):
    write_image(folder, "a", object_xml("cat/dog", 1, 1, 30, 20))
    with pytest.raises(ValueError, match="class 'cat/dog' in .*Annotations holds a slash"):
        register_voc(folder, "train", tmp_path)


def test_images_of_other_endings_and_names(tmp_path):
    folder = tmp_path / "pets"
    for stem in ("a", "b", "c"):
        extra = "<filename>other.png</filename>" if stem == "c" else ""
        write_image(folder, stem, extra, object_xml("dog", 1, 1, 30, 20))
    for old, new in (("a", "a.PNG"), ("b", "b.jpeg"), ("c", "other.png")):
        (folder / "JPEGImages" / f"{old}.jpg").rename(folder / "JPEGImages" / new)
    name = register_voc(folder, None, tmp_path)
    files = [Path(record["file_name"]).name for record in DatasetCatalog.get(name)]
    assert files == ["a.PNG", "b.jpeg", "other.png"]


def test_the_xml_chooses_between_two_images_of_one_stem(tmp_path):
    folder = tmp_path / "pets"
    write_image(folder, "a", "<filename>a.png</filename>", object_xml("dog", 1, 1, 30, 20))
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "JPEGImages" / "a.png")
    (record,) = DatasetCatalog.get(register_voc(folder, None, tmp_path))
    assert Path(record["file_name"]).name == "a.png"


def test_loose_voc_is_evaluated_from_a_mended_copy(folder, tmp_path):
    """Fractions, spaces in ids, no pose: Detectron2's own evaluator fails on each of these."""
    write_image(folder, "my cat", object_xml("cat", 2.4, 3.2, 60.3, 45.1, extra=""))
    write_image(folder, "z", object_xml("zebra", 5, 6, 40, 41, extra=""))
    write_split(folder, "train", "my cat\n\na\nz")
    name = register_voc(folder, "train", tmp_path / "clean")
    records = DatasetCatalog.get(name)
    assert records[0]["annotations"][0]["bbox"] == pytest.approx([1.4, 2.2, 60.3, 45.1])
    assert records[0]["file_name"].endswith("my cat.jpg") and " " not in records[0]["image_id"]
    found = precision(name)
    assert found["AP50"] == pytest.approx(100) and found["AP"] > 90


def test_difficult_objects_are_trained_on_and_not_evaluated(folder, tmp_path):
    write_split(folder, "val", "b\nc\na\n\n")
    name = register_voc(folder, "val", tmp_path / "clean")
    assert [len(record["annotations"]) for record in DatasetCatalog.get(name)] == [1, 1, 2]
    copied = list((tmp_path / "clean").rglob("b.xml"))
    assert len(copied) == 1 and "<difficult>1</difficult>" in copied[0].read_text()
    assert precision(name)["AP"] == pytest.approx(100)


def test_dropped_and_clipped_boxes_are_counted_and_reported_once(folder, tmp_path, caplog):
    write_image(
        folder,
        "a",
        object_xml("dog", 10, 10, 9, 20),
        object_xml("dog", 10, 30, 20, 20),
        object_xml("zebra", WIDTH + 1, 5, WIDTH + 9, 9),
        object_xml("cat", -9, 11, 200, 41),
        object_xml("dog", 1, 1, WIDTH, HEIGHT),
        object_xml("zebra", 0, 0, WIDTH + 1, HEIGHT + 1),
    )
    write_split(folder, "train", "a")
    with caplog.at_level(logging.WARNING):
        name = register_voc(folder, "train", tmp_path / "clean")
        register_voc(folder, "train", tmp_path / "clean")
    (message,) = [r.getMessage() for r in caplog.records if r.name == "iou_d2.data.voc"]
    assert name in message
    assert "2 boxes without area were dropped (first: a.xml, object 1)" in message
    assert "1 boxes outside their image were dropped (first: a.xml, object 3)" in message
    assert "1 boxes were clipped to their image (first: a.xml, object 4)" in message
    boxes = [a["bbox"] for a in DatasetCatalog.get(name)[0]["annotations"]]
    whole = [-1, -1, WIDTH + 1, HEIGHT + 1]
    assert boxes == [[0, 10, WIDTH, 41], [0, 0, WIDTH, HEIGHT], whole]
    assert precision(name)["AP"] == pytest.approx(100)
