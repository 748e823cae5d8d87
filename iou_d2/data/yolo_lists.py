"""What a YOLO data.yaml says: class names, and the images of a split with their label files.

Nothing outside the folder of data.yaml is read unless DATASETS.TRUST_PATHS says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from iou_d2.errors import InputError, MissingFileError

from .bounds import Bounds

_MOST_BYTES = 2**20
_IMAGES = {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping of a data.yaml. Raises InputError; tags are not run."""
    if not file.is_file():
        raise MissingFileError(f"There is no file {file}.")
    if file.stat().st_size > _MOST_BYTES:
        raise InputError(f"{file} has more than a megabyte, too much for a data.yaml.")
    try:
        data = yaml.safe_load(file.read_bytes().decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file} cannot be read as YAML: {reason}") from error
    if not isinstance(data, dict):
        raise InputError(f"{file} is no data.yaml: it needs names, and train or val.")
    return data


def class_names(file: Path, data: dict[str, Any]) -> list[str]:
    """Class names in order of the class number; `names` is a list or a mapping {0: name}."""
    names = data.get("names")
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise InputError(f"{file}: the numbers of names must be 0 to {len(names) - 1}.")
        numbered = {str(number): name for number, name in names.items()}
        names = [numbered[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise InputError(f"{file} needs names: a list, or a mapping from class number to name.")
    for index, name in enumerate(names):
        if (
            isinstance(name, bool)
            or not isinstance(name, str | int | float)
            or not f"{name}".strip()
        ):
            raise InputError(f"{file}: name {index} is no text: write it in quotes.")
    names = [f"{name}".strip() for name in names]
    if len(set(names)) != len(names):
        raise InputError(f"{file} gives two classes the same name.")
    if "nc" in data and str(data["nc"])[:20] != str(len(names)):
        raise InputError(f"{file} says nc: {str(data['nc'])[:20]} but names {len(names)} classes.")
    return names


def split_images(file: Path, data: dict[str, Any], split: str, bounds: Bounds) -> list[Path]:
    """The images of a split, sorted within each folder.

    Raises InputError where there are none, or one is outside of `bounds`.
    """
    entries = data.get(split)
    if not entries:
        there = ", ".join(key for key in ("train", "val", "test") if data.get(key))
        raise InputError(f"{file} has no '{split}'; the splits there are {there or 'none'}.")
    images: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, str) or "\0" in entry:
            raise InputError(f"{file}: '{split}' must be a path or a list of paths.")
        images += _images_of(file, _find(file, data, entry, bounds), bounds)
    if not images:
        raise InputError(f"{file}: '{split}' holds no image.")
    twice = len(images) - len(set(images))
    if twice:
        raise InputError(f"{file}: '{split}' lists {twice} images twice.")
    return images


def label_file(image: Path) -> Path:
    """The last folder `images` replaced by `labels`, else beside the image, as ultralytics does."""
    parts = list(image.parent.parts)
    for index in reversed(range(len(parts))):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts, f"{image.stem}.txt")


def _find(file: Path, data: dict[str, Any], entry: str, bounds: Bounds) -> Path:
    """An entry below `path:`, or below data.yaml.

    Roboflow writes ../train/images for a folder beside data.yaml: that one goes first.
    """
    entry = entry.replace("\\", "/")
    root = data.get("path") or "."
    if not isinstance(root, str) or "\0" in root:
        raise InputError(f"{file}: 'path' must be a folder.")
    inside = entry
    while inside.startswith("../"):
        inside = inside[3:]
    bases = [file.parent / root.replace("\\", "/"), file.parent]
    candidates = [base / text for text in (inside, entry) for base in bases]
    found = [Path(os.path.normpath(path)) for path in candidates if path.exists()]
    if not found:
        tried = ", ".join(dict.fromkeys(os.path.normpath(path) for path in candidates))
        raise MissingFileError(f"{file} leads to nothing with '{entry[:200]}'; tried: {tried}.")
    bounds.require(found[0])
    return found[0]


def _images_of(file: Path, source: Path, bounds: Bounds) -> list[Path]:
    if source.is_dir():
        found = bounds.files_below(source)
        images = [path for path in found if path.suffix.lower() in _IMAGES]
    elif source.suffix.lower() == ".txt":
        images = _listed(file, source)
    else:
        raise InputError(f"{file} leads to {source}, which is no folder and no list (.txt).")
    bounds.require_files(images)
    return images


def _listed(file: Path, source: Path) -> Sequence[Path]:
    """The lines of a list of images: below the list, or below data.yaml."""
    try:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeError as error:
        raise InputError(f"{source} is not UTF-8 text: {error}.") from error
    images = []
    for line in filter(None, (line.strip().replace("\\", "/") for line in lines)):
        candidates = [source.parent / line, file.parent / line]
        images.append(next((path for path in candidates if path.is_file()), candidates[0]))
    return [Path(os.path.normpath(path)) for path in images]
