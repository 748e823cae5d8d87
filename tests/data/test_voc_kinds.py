"""Kinds of VOC folders that tools write: what has one meaning is read, hostile XML is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from iou_d2.data.cleaning import Trust
from iou_d2.data.voc import register_voc
from iou_d2.errors import InputError
from voc_files import (
    HEIGHT,
    WIDTH,
    object_xml,
    precision,
    write_image,
    write_pets,
    write_split,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_pets(tmp_path / "pets")


def text_of(name: str) -> str:
    return str(MetadataCatalog.get(name).findings)


@pytest.mark.parametrize("size", ["", "<size/>", "<size><width>0</width><height>0</height></size>"])
def test_missing_sizes_come_from_the_image(folder, tmp_path, size):
    write_image(folder, "a", object_xml("cat", 1, 1, 30, 20), size=size or " ")
    name = register_voc(folder, "train", tmp_path)
    assert [(r["width"], r["height"]) for r in DatasetCatalog.get(name)] == [(WIDTH, HEIGHT)] * 2
    assert "1 sizes were missing or zero" in text_of(name)


@pytest.mark.parametrize(
    "text",
    ["\ufeffb\r\na\r\n", "b -1\na  1\n", "b 0\na\n", "b.jpg\na.JPG\n", "JPEGImages/b.jpg\n./a"],
)
def test_lines_of_splits(folder, tmp_path, text):
    write_split(folder, "train", f"{text}\nc")
    name = register_voc(folder, "train", tmp_path / "clean")
    assert [record["image_id"] for record in DatasetCatalog.get(name)] == ["b", "a", "c"]
    assert precision(name)["AP"] == pytest.approx(100)


def test_ids_with_folders_beside_flat_ones(folder, tmp_path):
    for part in ("Annotations", "JPEGImages"):
        (folder / part / "task1").mkdir()
    for part, ending in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        (folder / part / f"a.{ending}").rename(folder / part / "task1" / f"a.{ending}")
    write_split(folder, "train", "task1/a\nb\nc\n")
    name = register_voc(folder, "train", tmp_path / "clean")
    records = DatasetCatalog.get(name)
    assert [record["image_id"] for record in records] == ["task1/a", "b", "c"]
    assert records[0]["file_name"] == str(folder / "JPEGImages" / "task1" / "a.jpg")
    assert precision(name)["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("encoding", "declared"),
    [("gb2312", "gb2312"), ("utf-16", "utf-16"), ("utf-8-sig", "utf-8"), ("gbk", "GBK")],
)
def test_encodings(folder, tmp_path, encoding, declared):
    xml = folder / "Annotations" / "a.xml"
    text = xml.read_text().replace("cat", "\u732b")
    xml.write_bytes(f'<?xml version="1.0" encoding="{declared}"?>{text}'.encode(encoding))
    name = register_voc(folder, "train", tmp_path)
    assert "\u732b" in MetadataCatalog.get(name).thing_classes


@pytest.mark.parametrize("declared", ["", "<?xml version='1.0' encoding='nonsense'?>"])
def test_unknown_encodings_name_the_file(folder, tmp_path, declared):
    xml = folder / "Annotations" / "a.xml"
    xml.write_bytes(declared.encode() + xml.read_text().replace("cat", "\u72d7").encode("gbk"))
    with pytest.raises(InputError, match=r"a\.xml cannot be decoded"):
        register_voc(folder, "train", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '<!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><annotation>&d;</annotation>',
        '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>',
        "<annotations><image/></annotations>",
        "<annotation>" + "<a>" * 100_000,
        "<annotation>\0</annotation>",
        f"<annotation><size><width>{'9' * 5000}</width></size></annotation>",
    ],
)
def test_hostile_xml_is_one_short_sentence(folder, tmp_path, text):
    (folder / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(InputError, match=r"a\.xml") as error:
        register_voc(folder, "train", tmp_path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("degrees", [90, 40, -30, 400])
def test_boxes_that_cvat_turned(folder, tmp_path, degrees):
    turned = f"<attribute><name>rotation</name><value>{degrees}</value></attribute>"
    box = object_xml("cat", 21, 19, 40, 28, extra=f"<attributes>{turned}</attributes>")
    write_image(folder, "a", box)
    write_split(folder, "train", "a")
    name = register_voc(folder, "train", tmp_path)
    angle = torch.tensor(degrees * torch.pi / 180)
    corners = torch.tensor([[-10.0, -5], [10, -5], [10, 5], [-10, 5]])
    matrix = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    spun = corners @ matrix.T + torch.tensor([30.0, 23.0])
    expected = [*spun.min(0).values.tolist(), *spun.max(0).values.tolist()]
    found = DatasetCatalog.get(name)[0]["annotations"][0]["bbox"]
    assert found == pytest.approx(expected, abs=1e-4) and "1 boxes that CVAT turned" in text_of(
        name
    )


@pytest.mark.parametrize(
    ("annotations", "images"),
    [("annotations", "images"), ("ANNOTATIONS", "jpegimages"), ("same", "same"), (".", ".")],
)
def test_layouts(tmp_path, annotations, images):
    strict, folder = tmp_path / "strict", tmp_path / "loose"
    for stem in ("a", "b"):
        write_image(strict, stem, object_xml("dog", 1, 1, 30, 20))
    for part, target in (("Annotations", annotations), ("JPEGImages", images)):
        (folder / target).mkdir(parents=True, exist_ok=True)
        for file in (strict / part).iterdir():
            file.rename(folder / target / file.name)
    name = register_voc(folder, None, tmp_path / "clean")
    assert len(DatasetCatalog.get(name)) == 2 and precision(name)["AP"] == pytest.approx(100)


def test_one_folder_a_split(tmp_path):
    for split, animal in (("train", "dog"), ("valid", "cat")):
        write_image(tmp_path / "strict", split, object_xml(animal, 1, 1, 30, 20))
        (tmp_path / "loose" / split).mkdir(parents=True)
        for part, ending in (("Annotations", "xml"), ("JPEGImages", "jpg")):
            file = tmp_path / "strict" / part / f"{split}.{ending}"
            file.rename(tmp_path / "loose" / split / file.name)
    name = register_voc(tmp_path / "loose", "valid", tmp_path / "clean")
    assert [record["image_id"] for record in DatasetCatalog.get(name)] == ["valid/valid"]
    assert MetadataCatalog.get(name).thing_classes == ["cat", "dog"]
    with pytest.raises(InputError, match="the splits there are train, valid"):
        register_voc(tmp_path / "loose", None, tmp_path / "clean")


def test_linked_folders_are_read(tmp_path):
    write_image(tmp_path / "strict", "a", object_xml("dog", 1, 1, 30, 20))
    folder = tmp_path / "loose"
    (folder / ".pool").mkdir(parents=True)
    (folder / "train").mkdir()
    for part, ending in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        file = tmp_path / "strict" / part / f"a.{ending}"
        (folder / ".pool" / f"b.{ending}").write_bytes(file.read_bytes())
        file.rename(folder / "train" / file.name)
    (folder / "train" / "more").symlink_to(folder / ".pool")
    (folder / ".pool" / "circle").symlink_to(folder)
    name = register_voc(folder, "train", tmp_path / "clean")
    ids = [record["image_id"] for record in DatasetCatalog.get(name)]
    assert ids == ["train/a", "train/more/b"] and precision(name)["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    "part",
    [
        *("Annotations", "JPEGImages", "ImageSets", "ImageSets/Main/train.txt"),
        *("Annotations/a.xml", "JPEGImages/a.jpg"),
    ],
)
def test_links_to_outside_need_trust(folder, tmp_path, part):
    (folder / part).rename(tmp_path / "outside")
    (folder / part).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match=r"outside.*outside of its folder.*DATASETS\.TRUST_PATHS"):
        register_voc(folder, "train", tmp_path / "clean")
    name = register_voc(folder, "train", tmp_path / "clean", Trust(paths=True))
    assert len(DatasetCatalog.get(name)) == 2


def test_no_box_left_is_an_error(folder, tmp_path):
    write_image(folder, "a", object_xml("dog", 30, 20, 1, 1))
    write_split(folder, "train", "a")
    with pytest.raises(InputError, match=r"No box of voc:.* is left of 1: 1 boxes without area"):
        register_voc(folder, "train", tmp_path)


def test_fractions_are_refused_unless_trusted(folder, tmp_path):
    write_image(folder, "a", object_xml("dog", 0.1, 0.2, 0.5, 0.6))
    write_split(folder, "train", "a")
    with pytest.raises(InputError, match=r"lie in 0\.\.1.*DATASETS\.TRUST_BOXES"):
        register_voc(folder, "train", tmp_path)
    register_voc(folder, "train", tmp_path, Trust(boxes=True))


def test_boxes_of_another_size_of_the_images_are_refused(folder, tmp_path):
    write_image(folder, "a", *[object_xml("dog", 10, 10, 300 + i, 200) for i in range(12)])
    write_split(folder, "train", "a")
    with pytest.raises(InputError, match=r"12 of the 12 boxes .* stick out .*TRUST_BOXES"):
        register_voc(folder, "train", tmp_path)


def test_indices_are_those_of_the_classes_at_loading(folder, tmp_path):
    name = register_voc(folder, "train", tmp_path)
    metadata = MetadataCatalog.get(name)
    del metadata.thing_classes
    metadata.thing_classes = ["zebra", "dog", "cat"]
    assert DatasetCatalog.get(name)[0]["annotations"][0]["category_id"] == 2


@pytest.mark.parametrize("tag", ["Object", "OBJECT"])
def test_tags_in_other_case(folder, tmp_path, tag):
    xml = folder / "Annotations" / "a.xml"
    xml.write_text(xml.read_text().replace("object>", f"{tag}>").replace("xmin>", "Xmin>"))
    write_split(folder, "train", "b\na\nc\n")
    name = register_voc(folder, "train", tmp_path / "clean")
    assert [len(record["annotations"]) for record in DatasetCatalog.get(name)] == [1, 2, 1]
    assert precision(name)["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "is_difficult"), [("true", 1), ("TRUE", 1), ("False", 0), ("", 0)]
)
def test_words_for_difficult(folder, tmp_path, text, is_difficult):
    write_image(folder, "a", object_xml("dog", 1, 1, 30, 20, difficult=text))
    write_split(folder, "train", "a")
    name = register_voc(folder, "train", tmp_path / "clean")
    (copied,) = (tmp_path / "clean").rglob("a.xml")
    assert f"<difficult>{is_difficult}</difficult>" in copied.read_text()
    assert len(DatasetCatalog.get(name)[0]["annotations"]) == 1


def test_unknown_words_for_difficult_are_refused(folder, tmp_path):
    write_image(folder, "a", object_xml("dog", 1, 1, 30, 20, difficult="maybe"))
    with pytest.raises(InputError, match=r"a\.xml: object 1 has the difficult 'maybe'"):
        register_voc(folder, "train", tmp_path / "clean")
