"""Datasets by name in DATASETS.TRAIN and DATASETS.TEST, a user's own ones without any Python.

coco:ANNOTATIONS.json                images in `images/` beside the JSON, or beside it
coco:ANNOTATIONS.json:IMAGE_FOLDER
voc:FOLDER:SPLIT                     Annotations/, JPEGImages/, ImageSets/Main/SPLIT.txt
voc:FOLDER                           all annotations of a folder without ImageSets
yolo:DATA.yaml:SPLIT                 images/ and labels/*.txt; SPLIT is train, val or test
shapes_train, coco_2017_train, ...   generated shapes; Detectron2's built-in names
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from detectron2.data import DatasetCatalog

from iou_d2.errors import InputError

from .cleaning import NO_TRUST, Trust
from .coco import register_coco
from .shapes import register_shapes, register_shapes_by_name
from .voc import register_voc
from .yolo import register_yolo

FORMS = "coco:ANNOTATIONS.json[:IMAGE_FOLDER], voc:FOLDER[:SPLIT] or yolo:DATA.yaml:SPLIT"


def register_dataset(name: str, clean_dir: str | os.PathLike[str], trust: Trust = NO_TRUST) -> str:
    """Register a dataset where needed and return the name to keep in the config.

    A user's own dataset comes back with absolute paths, so that a saved config works from any
    folder; every other name comes back unchanged. Registering again does nothing.

    Args:
        name: see the head of this file; relative paths start at the working directory.
        clean_dir: folder for mended copies of annotations, made only when something was mended.
        trust: what is taken as it is written though it looks wrong.

    Raises:
        InputError: an unknown name (the nearest ones are given), or broken annotations.
        MissingFileError: annotations or images that are not there.
    """
    register_shapes()
    if name in DatasetCatalog:
        return name
    if name.startswith(("coco:", "voc:", "yolo:")):
        return _register_own(name, Path(clean_dir).absolute(), trust)
    if register_shapes_by_name(name):
        return name
    nearest = difflib.get_close_matches(name, DatasetCatalog.list())
    hint = f" Did you mean {', '.join(nearest)}?" if nearest else ""
    raise InputError(f"There is no dataset '{name}'.{hint} Data of your own is given as {FORMS}.")


def _register_own(name: str, clean_dir: Path, trust: Trust) -> str:
    kind, _, rest = name.partition(":")
    parts = _paths(name, rest)
    if len(parts) > 2 or not all(parts) or (kind == "yolo" and len(parts) != 2):
        raise InputError(f"'{name}' is no dataset: write {FORMS}, with paths that hold no colon.")
    path = Path(os.path.abspath(os.path.expanduser(parts[0])))
    if kind == "yolo":
        return register_yolo(path, parts[1], clean_dir, trust)
    if kind == "voc":
        return register_voc(path, parts[1] if len(parts) == 2 else None, clean_dir, trust)
    folder = Path(os.path.abspath(os.path.expanduser(parts[1]))) if len(parts) == 2 else None
    return register_coco(path, folder, clean_dir, trust)


def _paths(name: str, rest: str) -> list[str]:
    """The parts of `rest`, the name without its kind, between colons."""
    if os.name == "nt":
        return split_with_drives(rest)
    for letter, slash in re.findall(r"(?:^|:)([A-Za-z]):([\\/])", rest):
        if slash == "\\" or not os.path.exists(letter):
            raise InputError(f"'{name}' holds a Windows path, which this machine does not have.")
    return rest.split(":")


def split_with_drives(text: str) -> list[str]:
    """The parts between colons; that of a Windows drive (C:\\data, C:/data) divides nothing."""
    return re.split(r"(?<!^[A-Za-z])(?<!:[A-Za-z]):|:(?![\\/])", text)
