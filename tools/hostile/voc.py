"""Pascal VOC folders: broken XML, entities, encodings, and split files."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from .datasets import judge_dataset
from .files import SIDES, copy_folder, write_images
from .judge import Surface, Try
from .mutate import edit_bytes, edit_xml, to_xml

_BOMB = "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(9))
HEADS = (
    f'<!DOCTYPE x [<!ENTITY e0 "x">{_BOMB}]><annotation>&e9;</annotation>',
    '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>',
    '<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd"><annotation/>',
    "<a>" * 100_000,
    "<a>" * 100_000 + "</a>" * 100_000,
    "<annotation " + " ".join(f'a{i}="1"' for i in range(10_000)) + "/>",
    "",
    "<annotation/>",
)
ENCODINGS = ("utf-16", "gb2312", "latin-1", "utf-8-sig", "rot13", "utf-7", "idna", "zlib", "x")


def valid_xml(name: str, size: tuple[int, int]) -> ET.Element:
    root = ET.Element("annotation")
    ET.SubElement(root, "filename").text = name
    node = ET.SubElement(root, "size")
    for tag, value in zip(("width", "height", "depth"), (*size, 3)):
        ET.SubElement(node, tag).text = str(value)
    for index in range(2):
        node = ET.SubElement(root, "object")
        ET.SubElement(node, "name").text = ("cat", "dog")[index]
        ET.SubElement(node, "difficult").text = str(index)
        box = ET.SubElement(node, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), (3, 4, 20 + index, 19)):
            ET.SubElement(box, tag).text = str(value)
    return root


def prepare(folder: Path) -> Path:
    names = write_images(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    for name, size in zip(names, SIDES):
        tree = ET.ElementTree(valid_xml(name, size))
        tree.write(folder / "Annotations" / f"{Path(name).stem}.xml")
    split = folder / "ImageSets" / "Main" / "train.txt"
    split.parent.mkdir(parents=True)
    split.write_text("im0\nim1\nim2\n")
    return folder


def make(prepared: Path, one: Try) -> Path:
    copy_folder(prepared, one.folder)
    plan = one.plan
    xml = one.folder / "Annotations" / f"im{plan.special % 3}.xml"
    if plan.special % 11 == 0:
        file = one.folder / "ImageSets" / "Main" / "train.txt"
        file.write_bytes(edit_bytes(file.read_bytes(), plan.edits))
    elif plan.special % 11 == 1:
        xml.write_text(HEADS[plan.special // 11 % len(HEADS)])
    elif plan.special % 11 == 2:
        encoding = ENCODINGS[plan.special // 11 % len(ENCODINGS)]
        text = xml.read_text().replace("cat", "caf\u00e9")
        head = f'<?xml version="1.0" encoding="{encoding}"?>'
        known = encoding if encoding in ENCODINGS[:4] else "utf-8"
        xml.write_bytes((head + text).encode(known, "replace"))
    elif plan.of_values:
        xml.write_bytes(to_xml(edit_xml(ET.parse(xml).getroot(), plan.edits)))
    else:
        xml.write_bytes(edit_bytes(xml.read_bytes(), plan.edits))
    return one.folder


def judge(folder: Path) -> str:
    return judge_dataset(f"voc:{folder}:train", folder, ("im", "train.txt", str(folder)))


SURFACES = {
    "voc": Surface(
        "voc",
        "VOC XML, split files, entities, encodings: as COCO",
        tries=2200,
        prepare=prepare,
        make=make,
        judge=judge,
        chunks=2,
    )
}
