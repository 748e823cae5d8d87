"""A user's Pascal VOC folder: Annotations/*.xml, JPEGImages/ and ImageSets/Main/SPLIT.txt.

VOC counts pixels from one and includes both ends: (xmin, xmax) = (1, W) spans the whole width. The
boxes here are XYXY in absolute pixels with (0, 0) the outer corner of the first pixel, as in
Detectron2's reader: one is taken off xmin and ymin only.
"""

from __future__ import annotations

import logging
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import BoxMode

from .cleaning import (
    NO_TRUST,
    Box,
    Findings,
    Trust,
    clean_box,
    copy_name,
    require_files,
    write_text,
)

ALL = "all"  # the split of a folder without ImageSets


class VocObject(NamedTuple):
    name: str
    difficult: int
    box: Box


class VocImage(NamedTuple):
    image_id: str
    file_name: str  # as the XML says; the file itself may have another ending
    width: int
    height: int
    objects: list[VocObject]


def register_voc(folder: Path, split: str | None, clean_dir: Path, trust: Trust = NO_TRUST) -> str:
    """Register one split of a VOC folder with Detectron2 and return its name, `voc:FOLDER[:SPLIT]`.

    The classes are those of all annotations of the folder, sorted, so that its splits agree.
    Objects marked difficult are trained on, as Detectron2 does, and left out by its VOC evaluator.
    That evaluator reads XML itself, and only strict VOC (whole numbers, pose, truncated, ids
    without spaces): where it would fail or see other boxes, it is given a mended copy in
    `clean_dir`, in which coordinates are rounded.

    Args:
        folder: absolute path. split: a file of ImageSets/Main without its ending, or None for all
            annotations of a folder without ImageSets. clean_dir: where a mended copy goes.

    Raises:
        FileNotFoundError: a folder, the split, an annotation or an image is not there.
        ValueError: an annotation or the split is broken; the sentence names file and object.
    """
    name = f"voc:{folder}" if split is None else f"voc:{folder}:{split}"
    if name in DatasetCatalog:
        return name
    image_ids = _read_split(folder, split)
    images, classes = _read_annotations(folder, image_ids)
    files = _image_files(folder, images)
    require_files(folder, "images", files)
    cleaned, findings = _clean(images)
    source = folder
    if split is None or not _evaluator_agrees(folder, split, cleaned):
        source = clean_dir / copy_name(f"{folder.name}-{split or ALL}", name)
        _write_copy(source, split or ALL, cleaned)
    logger = logging.getLogger(__name__)
    if findings:
        logger.warning(f"{name}: {findings}.")
    if source != folder:
        logger.info(f"The VOC evaluator reads a copy of {name} in whole pixels, {source}.")
    dicts = [_to_detectron2(image, file, classes) for image, file in zip(cleaned, files)]
    DatasetCatalog.register(name, lambda: dicts)
    MetadataCatalog.get(name).set(
        thing_classes=classes,
        dirname=str(source),
        split=split or ALL,
        year=2007 if "2007" in folder.name else 2012,
        evaluator_type="pascal_voc",
    )
    return name


def _read_split(folder: Path, split: str | None) -> list[str]:
    for part in ("Annotations", "JPEGImages"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder} is not a Pascal VOC folder: it has no {part}/.")
    lists = folder / "ImageSets" / "Main"
    if split is None:
        if lists.is_dir():
            raise ValueError(f"Name a split, as in voc:{folder}:SPLIT; {_splits(lists)}")
        return sorted(path.stem for path in (folder / "Annotations").glob("*.xml"))
    file = lists / f"{split}.txt"
    if not file.is_file():
        raise FileNotFoundError(f"There is no split file {file}; {_splits(lists)}")
    image_ids = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    image_ids = [image_id for image_id in image_ids if image_id]
    if not image_ids:
        raise ValueError(f"{file} lists no image.")
    seen: set[str] = set()
    for image_id in image_ids:
        if image_id in seen:
            raise ValueError(f"{file} lists the image {image_id} twice.")
        seen.add(image_id)
    return image_ids


def _splits(lists: Path) -> str:
    names = sorted(path.stem for path in lists.glob("*.txt"))
    return f"the splits there are {', '.join(names)}." if names else "there is no other split."


def _read_annotations(folder: Path, image_ids: Sequence[str]) -> tuple[list[VocImage], list[str]]:
    """The images of the split, in its order, and the sorted class names of the whole folder."""
    annotations = folder / "Annotations"
    listed = [str(annotations / f"{image_id}.xml") for image_id in image_ids]
    require_files(folder, "annotations", listed)
    wanted, images, classes = set(image_ids), {}, set()
    for xml in sorted(annotations.glob("*.xml")):
        root = _parse(xml)
        classes.update(_text(xml, i, obj, "name") for i, obj in _objects(root))
        if xml.stem in wanted:
            images[xml.stem] = _read_image(xml, root)
    if not classes:
        raise ValueError(f"{annotations} holds no XML file with an object.")
    for name in classes:
        if "/" in name:
            raise ValueError(
                f"The class '{name}' in {annotations} holds a slash, which Detectron2's VOC "
                "evaluator cannot use: it writes one file a class."
            )
    return [images[image_id] for image_id in image_ids], sorted(classes)


def _parse(xml: Path) -> ET.Element:
    try:
        return ET.parse(xml).getroot()
    except ET.ParseError as error:
        raise ValueError(f"{xml} is not well-formed XML: {error}.") from error


def _objects(root: ET.Element) -> list[tuple[int, ET.Element]]:
    return list(enumerate(root.findall("object"), start=1))


def _text(xml: Path, index: int, obj: ET.Element, tag: str) -> str:
    text = (obj.findtext(tag) or "").strip()
    if not text:
        raise ValueError(f"{xml}: object {index} has no {tag}.")
    return text


def _read_image(xml: Path, root: ET.Element) -> VocImage:
    sides = [(root.findtext(f"size/{side}") or "").strip() for side in ("width", "height")]
    if not all(re.fullmatch("[1-9][0-9]{0,8}", side) for side in sides):
        raise ValueError(f"{xml} needs a size in whole pixels, not width, height = {sides}.")
    objects = []
    for index, obj in _objects(root):
        name = _text(xml, index, obj, "name")
        if obj.find("bndbox") is None:
            raise ValueError(f"{xml}: object {index} ({name}) has no bndbox.")
        difficult = int((obj.findtext("difficult") or "0").strip() == "1")
        objects.append(VocObject(name, difficult, _read_box(xml, index, obj)))
    file_name = (root.findtext("filename") or "").strip()
    return VocImage(xml.stem, file_name, int(sides[0]), int(sides[1]), objects)


def _read_box(xml: Path, index: int, obj: ET.Element) -> Box:
    values = []
    for side in ("xmin", "ymin", "xmax", "ymax"):
        text = _text(xml, index, obj, f"bndbox/{side}")
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        # The comparison fails for NaN and infinity.
        if not -1e12 < value < 1e12:
            raise ValueError(f"{xml}: object {index} has the {side} '{text}', which is no number.")
        values.append(value)
    return values[0] - 1, values[1] - 1, values[2], values[3]


def _image_files(folder: Path, images: Sequence[VocImage]) -> list[str]:
    """The image of each id, whatever its ending: the only one of that stem, or what XML names."""
    by_stem: dict[str, list[str]] = {}
    for path in sorted((folder / "JPEGImages").iterdir()):
        by_stem.setdefault(path.stem, []).append(path.name)
    files = []
    for image in images:
        found = by_stem.get(image.image_id, [])
        named = by_stem.get(Path(image.file_name).stem, [])
        if len(found) != 1 and image.file_name in named:
            found = [image.file_name]
        files.append(str(folder / "JPEGImages" / (found or [f"{image.image_id}.jpg"])[0]))
    return files


def _clean(images: Sequence[VocImage]) -> tuple[list[VocImage], Findings]:
    cleaned, findings = [], Findings()
    for image in images:
        objects = []
        for index, obj in enumerate(image.objects, start=1):
            box, finding = clean_box(obj.box, image.width, image.height)
            if finding is not None:
                findings.add(finding, f"{image.image_id}.xml, object {index}")
            if box is not None:
                objects.append(obj._replace(box=box))
        cleaned.append(image._replace(objects=objects))
    return cleaned, findings


def _to_detectron2(image: VocImage, file_name: str, classes: Sequence[str]) -> dict:
    annotations = [
        {
            "category_id": classes.index(obj.name),
            "bbox": list(obj.box),
            "bbox_mode": BoxMode.XYXY_ABS,
        }
        for obj in image.objects
    ]
    return {
        "file_name": file_name,
        "image_id": _evaluator_id(image),
        "height": image.height,
        "width": image.width,
        "annotations": annotations,
    }


def _evaluator_id(image: VocImage) -> str:
    """The evaluator splits its result lines at spaces, so that an id must hold none."""
    return image.image_id.replace(" ", "%20")


def _evaluator_box(box: Box) -> list[int]:
    return [round(box[0]) + 1, round(box[1]) + 1, round(box[2]), round(box[3])]


def _evaluator_agrees(folder: Path, split: str, images: Sequence[VocImage]) -> bool:
    """Whether Detectron2's VOC evaluator reads from `folder` what is in `images`."""
    listed = (folder / "ImageSets" / "Main" / f"{split}.txt").read_text(encoding="utf-8")
    if [line.strip() for line in listed.splitlines()] != [_evaluator_id(i) for i in images]:
        return False
    for image in images:
        try:
            seen = parse_rec(str(folder / "Annotations" / f"{image.image_id}.xml"))
        except (AttributeError, TypeError, ValueError):
            return False
        ours = [(o.name, o.difficult, _evaluator_box(o.box)) for o in image.objects]
        if [(o["name"], o["difficult"], o["bbox"]) for o in seen] != ours:
            return False
    return True


def _write_copy(folder: Path, split: str, images: Sequence[VocImage]) -> None:
    """Write what the evaluator reads of `images`: the split, and of each object what VOC asks."""
    for image in images:
        root = ET.Element("annotation")
        for obj in image.objects:
            node = ET.SubElement(root, "object")
            texts = {"name": obj.name, "pose": "Unspecified", "truncated": "0"}
            for tag, text in {**texts, "difficult": str(obj.difficult)}.items():
                ET.SubElement(node, tag).text = text
            bndbox = ET.SubElement(node, "bndbox")
            for side, value in zip(("xmin", "ymin", "xmax", "ymax"), _evaluator_box(obj.box)):
                ET.SubElement(bndbox, side).text = str(value)
        xml = folder / "Annotations" / f"{_evaluator_id(image)}.xml"
        write_text(xml, ET.tostring(root, encoding="unicode"))
    lines = "".join(f"{_evaluator_id(image)}\n" for image in images)
    write_text(folder / "ImageSets" / "Main" / f"{split}.txt", lines)
