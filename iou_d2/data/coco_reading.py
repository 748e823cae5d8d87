"""A user's COCO JSON, checked and mended, for training, evaluation and analysis alike.

Imports no Detectron2: the analysis of result files reads its ground truth here as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iou_d2.errors import InputError

from .cleaning import NO_TRUST, Findings, Trust
from .coco_annotations import AnnotationMender
from .coco_images import fill_in_sizes, find_image_folder, locate_images, no_image_folder
from .coco_mending import mend_categories, mend_images
from .json_file import no_garbage_collection, parse_json
from .packed_list import PackedList

MARK = "byte-order marks were left out"


@dataclass(frozen=True)
class CocoFile:
    """A mended COCO dict, whose "annotations" are a `PackedList`.

    Without "annotations" it is a test set on which nothing is measured.
    """

    data: dict[str, Any]
    image_folder: Path
    findings: Findings

    @property
    def has_annotations(self) -> bool:
        return "annotations" in self.data


def read_coco(
    json_file: Path, image_folder: Path | None = None, trust: Trust = NO_TRUST
) -> CocoFile:
    """Read, check and mend a COCO JSON and find its images.

    Args:
        json_file: the annotations.
        image_folder: where the images are; None looks where COCO, CVAT and Roboflow put them.
        trust: what is taken as it is written though it looks wrong.

    Raises:
        MissingFileError: the JSON or images that it lists are not there.
        InputError: the JSON is broken, contradicts itself, or its boxes are no XYWH in pixels.
    """
    data, findings = read_records(json_file, packed=True)
    images = data["images"]
    if image_folder is None:
        image_folder = find_image_folder(json_file, images)
        if image_folder is None:
            raise no_image_folder(json_file, images)
    images = locate_images(json_file, image_folder, images, findings, trust.paths)
    data["images"] = fill_in_sizes(image_folder, images, findings)
    doubt = mend_boxes(json_file, data, findings)
    if doubt is not None and not trust.boxes:
        raise InputError(f"{json_file}: {doubt}. If they are right, set DATASETS.TRUST_BOXES True.")
    return CocoFile(data, image_folder, findings)


def read_records(json_file: Path, packed: bool = False) -> tuple[dict[str, Any], Findings]:
    """A COCO dict with mended images and categories, and raw annotations; no image is looked for.

    Its annotations are a list or, `packed`, a `PackedList`. Raises as `read_coco` does.
    """
    data, has_mark = parse_json(json_file, "annotation file", "annotations" if packed else None)
    if not isinstance(data, dict):
        raise InputError(
            f"{json_file} holds a {type(data).__name__}, not a COCO dict with the keys "
            "images, annotations and categories: is it a file of detections?"
        )
    for key in ("images", "annotations", "categories"):
        if key == "annotations" and key not in data:
            continue
        if not isinstance(data.get(key), (list, PackedList)):
            raise InputError(f"{json_file} is not a COCO annotation file: it has no list '{key}'.")
    for key in ("images", "categories"):
        if not data[key]:
            raise InputError(f"{json_file} lists no {key}.")
    findings = Findings()
    if has_mark:
        findings.add(MARK, "the file's first bytes")
    annotations = data.get("annotations", [])
    data["images"] = mend_images(json_file, data["images"], findings)
    data["categories"] = mend_categories(json_file, data["categories"], annotations, findings)
    return data, findings


def mend_boxes(json_file: Path, data: dict[str, Any], findings: Findings) -> str | None:
    """Mend the annotations of `data`, in place, and say what makes one doubt their boxes.

    An image whose width or height is 0 has no known size: its boxes are not clipped.
    """
    if "annotations" not in data:
        return None
    sizes = {
        image["id"]: (image["width"], image["height"])
        if image["width"] and image["height"]
        else None
        for image in data["images"]
    }
    category_ids = {category["id"] for category in data["categories"]}
    annotations = data["annotations"]
    with no_garbage_collection():
        mender = AnnotationMender(json_file, annotations, sizes, category_ids, findings)
        if isinstance(annotations, PackedList):
            data["annotations"] = annotations.change(mender.mend)
        else:
            data["annotations"] = mender.mend(annotations)
        return mender.doubt()
