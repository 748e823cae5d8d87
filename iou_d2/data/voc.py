"""A user's Pascal VOC folder: Annotations/*.xml, JPEGImages/ and ImageSets/Main/SPLIT.txt.

VOC counts pixels from one and includes both ends: (xmin, xmax) = (1, W) spans the whole width. The
boxes here are XYXY in absolute pixels with (0, 0) the outer corner of the first pixel, as in
Detectron2's reader: one is taken off xmin and ymin only.
"""

from __future__ import annotations

import logging
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import BoxMode

from iou_d2.errors import InputError

from .bounds import Bounds
from .cleaning import (
    CLIPPED,
    NO_TRUST,
    OUTSIDE,
    Box,
    Findings,
    Trust,
    clean_box,
    copy_name,
    require_files,
    write_text,
)
from .images import read_header
from .voc_layout import VocLayout, find_layout, image_files, read_split, xml_files
from .voc_xml import VocImage, object_names, parse_xml, read_image

ALL = "all"  # the split of a folder without ImageSets
NO_SIZE = "sizes were missing or zero and read from the image"

# Fewer boxes say nothing about how a whole file was written.
_ENOUGH = 10


def register_voc(folder: Path, split: str | None, clean_dir: Path, trust: Trust = NO_TRUST) -> str:
    """Register one split of a VOC folder with Detectron2 and return its name, `voc:FOLDER[:SPLIT]`.

    The classes are those of all annotations of the folder, sorted, so that its splits agree.
    Objects marked difficult are trained on, as Detectron2 does, and left out by its VOC evaluator.
    That evaluator reads XML itself, and only strict VOC (whole numbers, pose, truncated, ids
    without spaces): where it would fail or see other boxes, it is given a mended copy in
    `clean_dir`, in which coordinates are rounded.

    Args:
        folder: absolute path, see voc_layout.py. split: a file of ImageSets/Main without its
            ending or a folder, or None for all annotations of a folder without ImageSets.
        clean_dir: where a mended copy goes. trust: `boxes` takes boxes that look like fractions
            or of which most stick out of their image; `paths` admits files outside of `folder`.

    Raises:
        MissingFileError: a folder, the split, an annotation or an image is not there.
        InputError: an annotation or the split is broken, with names of file and object; every box
            of the split was dropped.
    """
    name = f"voc:{folder}" if split is None else f"voc:{folder}:{split}"
    if name in DatasetCatalog:
        return name
    bounds = Bounds(folder, folder, trust)
    layout, findings = find_layout(folder, bounds), Findings()
    images, classes = _read_annotations(layout, split, bounds, findings)
    files = _image_files(layout, images, bounds)
    require_files(folder, "images", files)
    images = _with_sizes(images, files, findings)
    if not trust.boxes:
        _refuse_fractions(name, images)
    cleaned = _clean(name, images, findings, trust)
    source = folder
    if not layout.is_strict or split is None or not _evaluator_agrees(folder, split, cleaned):
        source = clean_dir / copy_name(f"{folder.name}-{split or ALL}", name)
        _write_copy(source, split or ALL, cleaned)
    logger = logging.getLogger(__name__)
    if findings:
        logger.warning(f"{name}: {findings}.")
    if source != folder:
        logger.info(f"The VOC evaluator reads a copy of {name} in whole pixels, {source}.")
    DatasetCatalog.register(name, lambda: _load(name, cleaned, files))
    MetadataCatalog.get(name).set(
        thing_classes=classes,
        dirname=str(source),
        split=split or ALL,
        year=2007 if "2007" in folder.name else 2012,
        evaluator_type="pascal_voc",
        findings=findings,
    )
    return name


def _read_annotations(
    layout: VocLayout, split: str | None, bounds: Bounds, findings: Findings
) -> tuple[list[VocImage], list[str]]:
    """The images of the split, in its order, and the sorted class names of the whole folder."""
    xmls = xml_files(layout.annotations, bounds)
    bounds.require_files(xmls.values())
    image_ids = read_split(layout, split, list(xmls), bounds, findings)
    listed = [str(xmls.get(i, layout.annotations / f"{i}.xml")) for i in image_ids]
    require_files(layout.folder, "annotations", listed)
    wanted, images, classes = set(image_ids), {}, set()
    for image_id, xml in xmls.items():
        root = parse_xml(xml, findings)
        classes.update(object_names(xml, root))
        if image_id in wanted:
            images[image_id] = read_image(xml, image_id, root, findings)
    if not classes:
        raise InputError(f"{layout.annotations} holds no XML file with an object.")
    for name in classes:
        if "/" in name or "\\" in name:
            raise InputError(
                f"The class '{name}' in {layout.annotations} holds a slash, which Detectron2's VOC "
                "evaluator cannot use: it writes one file a class."
            )
    return [images[image_id] for image_id in image_ids], sorted(classes)


def _image_files(layout: VocLayout, images: Sequence[VocImage], bounds: Bounds) -> list[str]:
    """The image of each id, whatever its ending: the only one of that stem, or what XML names."""
    by_stem = image_files(layout.images, bounds)
    by_name: dict[str, list[Path]] = {}
    for path in (path for paths in by_stem.values() for path in paths):
        by_name.setdefault(path.name, []).append(path)
        by_name.setdefault(f"{path.stem}\0", []).append(path)  # no name holds a zero byte
    files = []
    for image in images:
        folder, _, stem = image.image_id.rpartition("/")
        found = by_stem.get(image.image_id, [])
        named = by_name.get(image.file_name, [])
        beside = [path for path in named if path.parent == layout.images / folder]
        if len(found) != 1 and len(beside or named) == 1:
            found = beside or named
        if not found and len(by_name.get(f"{stem}\0", [])) == 1:
            found = by_name[f"{stem}\0"]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise InputError(f"{image.image_id}.xml may mean each of {names} in {layout.images}.")
        files.append(found[0] if found else layout.images / f"{image.image_id}.jpg")
    bounds.require_files(files)
    return [str(file) for file in files]


def _with_sizes(
    images: Sequence[VocImage], files: Sequence[str], findings: Findings
) -> list[VocImage]:
    sized = []
    for image, file in zip(images, files):
        if not image.width or not image.height:
            header = read_header(file)
            findings.add(NO_SIZE, f"{image.image_id}.xml")
            image = image._replace(width=header.width, height=header.height)
        sized.append(image)
    return sized


def _refuse_fractions(name: str, images: Sequence[VocImage]) -> None:
    boxes = [obj.box for image in images for obj in image.objects]
    if boxes and all(-1 <= min(b[:2]) and max(b[:2]) <= 0 and max(b[2:]) <= 1 for b in boxes):
        raise InputError(
            f"All {len(boxes)} boxes of {name} lie in 0..1: they look like fractions of the image, "
            "where VOC has pixels. Set DATASETS.TRUST_BOXES True if they are right."
        )


def _clean(
    name: str, images: Sequence[VocImage], findings: Findings, trust: Trust
) -> list[VocImage]:
    cleaned, boxes = [], Findings()
    total = sum(len(image.objects) for image in images)
    for image in images:
        objects = []
        for index, obj in enumerate(image.objects, start=1):
            box, finding = clean_box(obj.box, image.width, image.height)
            if finding is not None:
                findings.add(finding, f"{image.image_id}.xml, object {index}")
                boxes.add(finding, f"{image.image_id}.xml, object {index}")
            if box is not None:
                objects.append(obj._replace(box=box))
        cleaned.append(image._replace(objects=objects))
    if total and not any(image.objects for image in cleaned):
        raise InputError(f"No box of {name} is left of {total}: {boxes}.")
    sticking_out = boxes.count[CLIPPED] + boxes.count[OUTSIDE]
    if not trust.boxes and total >= _ENOUGH and sticking_out > total / 2:
        raise InputError(
            f"{sticking_out} of the {total} boxes of {name} stick out of their images: {boxes}. "
            "Set DATASETS.TRUST_BOXES True if they are right."
        )
    return cleaned


def _load(name: str, images: Sequence[VocImage], files: Sequence[str]) -> list[dict]:
    """Dicts for Detectron2, with the indices that the classes have now; objects of classes that the
    metadata do not name are left out."""
    classes = {c: index for index, c in enumerate(MetadataCatalog.get(name).thing_classes)}
    return [_to_detectron2(image, file, classes) for image, file in zip(images, files)]


def _to_detectron2(image: VocImage, file_name: str, classes: dict[str, int]) -> dict:
    annotations = [
        {
            "category_id": classes[obj.name],
            "bbox": list(obj.box),
            "bbox_mode": BoxMode.XYXY_ABS,
        }
        for obj in image.objects
        if obj.name in classes
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
    try:
        listed = (folder / "ImageSets" / "Main" / f"{split}.txt").read_text(encoding="utf-8")
    except UnicodeError:
        return False
    if [line.strip() for line in listed.splitlines()] != [_evaluator_id(i) for i in images]:
        return False
    for image in images:
        try:
            seen = parse_rec(str(folder / "Annotations" / f"{image.image_id}.xml"))
        except (AttributeError, OSError, TypeError, ValueError, ET.ParseError):
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
