"""Ground truth and result files as analysis and the commands read them: mended or refused.

The ground truth goes through the reader of the training data, so that both count the same objects.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from iou_d2.data.coco_annotations import box_arrays
from iou_d2.data.coco_boxes import doubt_about_boxes
from iou_d2.data.coco_images import fill_in_sizes, find_image_folder, locate_images
from iou_d2.data.coco_reading import mend_boxes, read_records
from iou_d2.data.coco_values import as_id, as_number, short
from iou_d2.data.json_file import parse_json
from iou_d2.errors import InputError

# What a results file may say of a detection beside its score.
OPTIONAL = ("cls_score", "pred_iou", "centerness")


def read_ground_truth(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mended COCO dict that training on the same file sees. What was mended is logged once, and
    that it has no "annotations", as that of an unlabelled test set.

    Sizes that the file does not give are read from images beside it. Where those are not there,
    boxes are left unclipped, and boxes that are hardly XYWH in pixels are kept: both are logged.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is no COCO file, or contradicts itself.
    """
    path = Path(os.path.abspath(path))
    data, findings = read_records(path)
    notes = []
    if "annotations" not in data:
        notes.append("it has no 'annotations', so that nothing can be measured against it")
    unknown = sum(not (image["width"] and image["height"]) for image in data["images"])
    if unknown:
        folder = find_image_folder(path, data["images"])
        if folder is not None:
            images = locate_images(path, folder, data["images"], findings)
            data["images"] = fill_in_sizes(folder, images, findings)
        else:
            notes.append(
                f"{unknown} images have no size and are not beside the file: their boxes are not "
                "held against their edges"
            )
    doubt = mend_boxes(path, data, findings)
    notes += [note for note in (doubt, str(findings)) if note]
    if notes:
        logging.getLogger(__name__).warning(f"{path}: {'; '.join(notes)}.")
    return data


def require_annotations(path: str | os.PathLike[str], truth: dict[str, Any]) -> None:
    """Raise an InputError where the ground truth that was read from `path` has no "annotations"; an
    empty list of them is one."""
    if "annotations" not in truth:
        raise InputError(f"{path} has no annotations: there is nothing to compare detections with.")


def read_results(path: str | os.PathLike[str], truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Detections of a COCO results file, held against the ground truth that they are for.

    Numbers that are strings are read, and ids as `read_ground_truth` reads them. Boxes that are
    hardly XYWH in pixels are kept, with a warning.

    Args:
        path: a JSON list of dicts with "image_id", "category_id", "bbox" (XYWH) and "score",
            optionally "cls_score", "pred_iou" and "centerness".
        truth: a COCO dict with "images" and "categories".

    Returns:
        The detections in the order of the file; other keys stay as they are.

    Raises:
        MissingFileError: there is no such file.
        InputError: a detection lacks a key, has a value that is no finite number, or an image or
            category that the ground truth lacks. The message names file and record.
    """
    path = Path(path)
    results, _ = parse_json(path, "results file")
    if not isinstance(results, list):
        raise InputError(
            f"{path} should hold a JSON list of detections, but holds a {type(results).__name__}."
        )
    known = {
        "image_id": {image["id"] for image in truth["images"]},
        "category_id": {category["id"] for category in truth["categories"]},
    }
    detections = []
    for index, result in enumerate(results):
        if not isinstance(result, dict):
            raise InputError(f"{path}: [{index}] is no detection but a {type(result).__name__}.")
        detections.append(_detection(f"{path}: [{index}]", result, known))
    for key in OPTIONAL:
        count = sum(key in detection for detection in detections)
        if 0 < count < len(detections):
            raise InputError(
                f'{path}: only {count} of {len(detections)} detections have the key "{key}".'
            )
    _warn_of_negative_sides(path, detections)
    _warn_of_odd_boxes(path, detections, truth)
    return detections


def _warn_of_negative_sides(path: Path, detections: list[dict]) -> None:
    count = sum(min(detection["bbox"][2:]) < 0 for detection in detections)
    if count:
        logging.getLogger(__name__).warning(
            f"{path}: {count} of {len(detections)} boxes have a negative width or height, and find "
            "nothing."
        )


def _warn_of_odd_boxes(path: Path, detections: list[dict], truth: dict[str, Any]) -> None:
    sizes = {}
    for image in truth["images"]:
        width, height = image.get("width"), image.get("height")
        sizes[image["id"]] = (width, height) if width and height else None
    doubt = doubt_about_boxes(*box_arrays(detections, sizes))
    if doubt is not None:
        logging.getLogger(__name__).warning(
            f"{path}: {doubt}. Results hold [x, y, w, h] in pixels, and are read so."
        )


def _detection(place: str, result: dict, known: dict[str, set]) -> dict[str, Any]:
    read = dict(result)
    for key in ("image_id", "category_id", "bbox", "score"):
        if key not in result:
            raise InputError(f"{place} has no {key}.")
    for key, ids in known.items():
        value = result[key]
        number = as_id(value)
        if number is not None and number in ids:
            read[key] = number
        elif not isinstance(value, str) or value not in ids:
            raise InputError(f"{place} has {key} {short(value)}, which is not in the ground truth.")
    box = result["bbox"]
    numbers = [as_number(v) for v in box] if isinstance(box, list) else []
    if len(numbers) != 4 or None in numbers:
        raise InputError(
            f"{place} needs a bbox of four finite numbers [x, y, width, height], not {short(box)}."
        )
    read["bbox"] = numbers
    for key in ("score", *OPTIONAL):
        if key in result:
            read[key] = as_number(result[key])
            if read[key] is None:
                raise InputError(
                    f"{place} needs a {key} that is a number, not {short(result[key])}."
                )
    return read
