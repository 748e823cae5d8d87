"""COCO ground truth and results as commands read them: checked once, each fault in a sentence."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable

from iou_d2.analysis import load_json
from iou_d2.errors import InputError, MissingFileError

_NUMBERS = (int, float)


def read_ground_truth(path: str | os.PathLike) -> dict:
    """A COCO dataset with "images", "categories" and "annotations", of which a test set without
    labels may have none.

    Raises InputError, with the name of the file and of what is wrong in it.
    """
    truth = _load(path, dict)
    if truth.get("annotations") is None:
        truth["annotations"] = []
    for name, keys in {
        "images": ("id", "file_name"),
        "categories": ("id", "name"),
        "annotations": ("image_id", "category_id", "bbox"),
    }.items():
        _check_entries(truth.get(name), keys, f"{path}: {name}")
    _check_unlike(truth["images"], f"{path}: images")
    _check_unlike(truth["categories"], f"{path}: categories")
    _check_known(truth["annotations"], truth, f"{path}: annotations")
    return truth


def read_results(path: str | os.PathLike, truth: dict) -> list[dict]:
    """COCO detections of images and categories of `truth`; there may be none.

    Raises InputError, with the name of the file and of what is wrong in it.
    """
    results = _load(path, list)
    where = f"{path}: detections"
    _check_entries(results, ("image_id", "category_id", "bbox", "score"), where)
    for index, result in enumerate(results):
        for key in ("score", "cls_score", "pred_iou", "centerness"):
            if key in result and not _is_number(result[key]):
                raise InputError(
                    f"{where}[{index}] has the {key} {result[key]!r}, which is no finite number."
                )
    _check_known(results, truth, where)
    return results


def _load(path: str | os.PathLike, kind: type):
    try:
        return load_json(path, kind)
    except FileNotFoundError as error:
        raise MissingFileError(str(error)) from error
    except RecursionError as error:
        raise InputError(f"{path} is not a valid JSON file: its brackets lie too deep.") from error
    except ValueError as error:
        raise InputError(str(error)) from error


def _check_entries(entries: object, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(entries, list):
        raise InputError(f"{where} should be a list, but is {type(entries).__name__}.")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"{where}[{index}] is no object, but {type(entry).__name__}.")
        missing = [key for key in keys if key not in entry]
        if missing:
            raise InputError(f"{where}[{index}] lacks {', '.join(missing)}.")
        for key in keys:
            if key == "bbox":
                _check_box(entry[key], f"{where}[{index}]")
            elif not isinstance(entry[key], Hashable):
                raise InputError(f"{where}[{index}] has the {key} {entry[key]!r}.")
            elif key in ("file_name", "name") and not isinstance(entry[key], str):
                raise InputError(
                    f"{where}[{index}] has the {key} {entry[key]!r}, which is no text."
                )


def _check_box(box: object, where: str) -> None:
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise InputError(f"{where} has the bbox {box!r}, which is not four finite numbers.")


def _check_unlike(entries: list[dict], where: str) -> None:
    seen = set()
    for entry in entries:
        if entry["id"] in seen:
            raise InputError(f"{where} have the id {entry['id']!r} twice.")
        seen.add(entry["id"])


def _check_known(entries: list[dict], truth: dict, where: str) -> None:
    for key, things in (("image_id", "images"), ("category_id", "categories")):
        known = {thing["id"] for thing in truth[things]}
        for index, entry in enumerate(entries):
            if entry[key] not in known:
                raise InputError(
                    f"{where}[{index}] has {key} {entry[key]!r}, which is not among the {things} "
                    "of the ground truth."
                )


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # of an integer
        return False
