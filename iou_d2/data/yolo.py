"""A user's YOLO data.yaml: images/ and labels/*.txt, one object a line: `class cx cy w h`.

The numbers are fractions of the image as it is shown; boxes here are XYXY in absolute pixels.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from iou_d2.errors import InputError

from .bounds import Bounds
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
from .images import read_header
from .yolo_lists import class_names, label_file, read_yaml, split_images

NO_LABELS = "images without a label file were taken as images without objects"
POLYGON = "polygons were replaced by the boxes around them"
KEYPOINTS = "key points were left out"
TWICE = "objects that a file lists twice were dropped"

_ROUNDING = 0.01  # of the image, as ultralytics allows


def register_yolo(yaml_file: Path, split: str, clean_dir: Path, trust: Trust = NO_TRUST) -> str:
    """Register one split of a YOLO dataset with Detectron2 and return `yolo:DATA.yaml:SPLIT`.

    A COCO JSON of the boxes is written to `clean_dir` for the evaluation, which needs one.

    Args:
        yaml_file: absolute path of data.yaml. split: train, val or test.
        trust: `paths` admits files outside of the folder of data.yaml.

    Raises:
        MissingFileError: data.yaml or an image is not there.
        InputError: data.yaml or a label file is broken; the sentence names file and line.
    """
    name = f"yolo:{yaml_file}:{split}"
    if name in DatasetCatalog:
        return name
    data, findings = read_yaml(yaml_file), Findings()
    classes = class_names(yaml_file, data)
    bounds = Bounds(yaml_file, yaml_file.parent, trust)
    images = split_images(yaml_file, data, split, bounds)
    require_files(yaml_file, "images", [str(image) for image in images])
    labels = [label_file(image) for image in images]
    if not any(label.is_file() for label in labels):
        raise InputError(f"{yaml_file}: '{split}' has no label file, the first: {labels[0]}.")
    bounds.require_files(labels)
    records = []
    for index, (image, label) in enumerate(zip(images, labels), start=1):
        header = read_header(image)
        objects = _read_labels(label, len(classes), "kpt_shape" in data, findings)
        records.append(
            {
                "file_name": str(image),
                "image_id": index,
                "width": header.width,
                "height": header.height,
                "objects": _clean(label, objects, header.width, header.height, findings),
            }
        )
    if not any(record["objects"] for record in records):
        raise InputError(f"{yaml_file}: '{split}' has no object. {findings}")
    json_file = clean_dir / f"{copy_name(f'{yaml_file.stem}-{split}', name)}.json"
    write_text(json_file, json.dumps(_to_coco(records, classes)))
    if findings:
        logging.getLogger(__name__).warning(f"{name}: {findings}.")
    DatasetCatalog.register(name, lambda: _load(name, records, classes))
    MetadataCatalog.get(name).set(
        thing_classes=classes,
        thing_dataset_id_to_contiguous_id={index: index for index in range(len(classes))},
        json_file=str(json_file),
        image_root=str(yaml_file.parent),
        evaluator_type="coco",
        findings=findings,
    )
    return name


def _read_labels(
    file: Path, classes: int, key_points: bool, findings: Findings
) -> list[tuple[int, Box]]:
    """Class and box (XYXY, fractions) of each line; an empty file has no object."""
    if not file.is_file():
        findings.add(NO_LABELS, file.name)
        return []
    try:
        lines = file.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeError as error:
        raise InputError(f"{file} is not UTF-8 text: {error}.") from error
    objects: list[tuple[int, Box]] = []
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        where = f"{file}, line {number}"
        found = _read_object(where, fields, classes, key_points, findings)
        if found in objects:
            findings.add(TWICE, where)
        else:
            objects.append(found)
    return objects


def _read_object(
    where: str, fields: Sequence[str], classes: int, key_points: bool, findings: Findings
) -> tuple[int, Box]:
    index, *values = (_number(where, field) for field in fields)
    if index != int(index) or not 0 <= index < classes:
        raise InputError(
            f"{where}: the class {fields[0][:20]} is none of the {classes} that data.yaml names."
        )
    if key_points and len(values) > 4:
        findings.add(KEYPOINTS, where)
        values = values[:4]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        hint = " Six are a detection with its score." if len(values) == 5 else ""
        raise InputError(
            f"{where} has {len(fields)} numbers, not 5 (class cx cy w h) or a polygon's.{hint}"
        )
    for value in values:
        if not -_ROUNDING <= value <= 1 + _ROUNDING:
            raise InputError(f"{where}: {value:g} is no fraction of the image, from 0 to 1.")
    if len(values) > 4:
        findings.add(POLYGON, where)
        x, y = values[::2], values[1::2]
        return int(index), (min(x), min(y), max(x), max(y))
    cx, cy, w, h = values
    return int(index), (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)


def _number(where: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where}: '{text[:40]}' is no number.")
    return value


def _clean(
    file: Path, objects: Sequence[tuple[int, Box]], width: int, height: int, findings: Findings
) -> list[tuple[int, Box]]:
    """The objects with boxes in pixels, mended; `width` and `height` are the image's."""
    kept = []
    for index, (x0, y0, x1, y1) in objects:
        pixels = (x0 * width, y0 * height, x1 * width, y1 * height)
        box, finding = clean_box(pixels, width, height)
        if finding is not None:
            findings.add(finding, file.name)
        if box is not None:
            kept.append((index, box))
    return kept


def _load(name: str, records: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict]:
    """Dicts for Detectron2, with the indices that the classes have now; objects of classes that the
    metadata do not name are left out."""
    now = {c: index for index, c in enumerate(MetadataCatalog.get(name).thing_classes)}
    return [
        {
            **{key: value for key, value in record.items() if key != "objects"},
            "annotations": [
                {
                    "category_id": now[names[index]],
                    "bbox": list(box),
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "iscrowd": 0,
                }
                for index, box in record["objects"]
                if names[index] in now
            ],
        }
        for record in records
    ]


def _to_coco(records: Sequence[dict[str, Any]], classes: Sequence[str]) -> dict[str, list]:
    images, annotations = [], []
    for record in records:
        sides = {key: record[key] for key in ("file_name", "width", "height")}
        images.append({"id": record["image_id"], **sides})
        for index, (x0, y0, x1, y1) in record["objects"]:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": index,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}
