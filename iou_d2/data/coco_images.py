"""Where the images of a COCO file are, and whether they may be read from there."""

from __future__ import annotations

import contextlib
import ntpath
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from iou_d2.errors import InputError, MissingFileError

from .cleaning import Findings, require_files, shortened
from .coco_values import short, where
from .images import read_header

WINDOWS = "file names with backslashes were read as paths"
BARE = "files were found under their bare names in the image folder"
SIZES = "sizes of images that were not given were read from the files"

_PREFIXES = ("instances_", "person_keypoints_", "captions_", "annotations_")


def image_folders(json_file: Path) -> list[list[Path]]:
    """Folders in which the images of `json_file` are looked for: groups in this order.

    Beside it a folder named as the split (CVAT, COCO), `images/`, its own folder (Roboflow); then
    the same beside the folder of the annotations.
    """
    split = json_file.stem
    for prefix in _PREFIXES:
        split = split.removeprefix(prefix)
    here, above = json_file.parent, json_file.parent.parent
    return [
        [here / "images" / split, here / split],
        [here / "images"],
        [here],
        [above / "images" / split, above / split, above / split / "images"],
        [above / "images", above],
    ]


def find_image_folder(json_file: Path, images: Sequence[dict]) -> Path | None:
    """The folder in the first group of `image_folders` that has the first image; None if it is
    nowhere.

    Raises InputError where two folders of that group have another first image each.
    """
    first = images[0]["file_name"]
    with _listings():
        for names in (_names(first), [_bare(first)]):
            for folders in image_folders(json_file):
                found = _holding(folders, names)
                if len(found) > 1:
                    one, other, *_ = found.values()
                    raise InputError(
                        f"The images of {json_file} may be those in {one} or in {other}, for both "
                        f"hold {shortened(names[-1])}: name the folder, as in "
                        f"coco:{json_file}:{other}."
                    )
                if found:
                    return next(iter(found.values()))
    return None


def _holding(folders: Sequence[Path], names: Sequence[str]) -> dict[str, Path]:
    """The first folder of each file, links followed, that has one of `names`."""
    found: dict[str, Path] = {}
    for folder in folders:
        for name in names:
            path = folder / name
            if os.path.isfile(path) and _is_inside(path, folder):
                found.setdefault(os.path.realpath(path), folder)
    return found


def no_image_folder(json_file: Path, images: Sequence[dict]) -> MissingFileError:
    here = json_file.parent
    return MissingFileError(
        f"The first image of {json_file}, {shortened(images[0]['file_name'])}, is neither in "
        f"{here / 'images'} nor in {here}, nor where COCO and CVAT put it: name the "
        f"image folder, as in coco:{json_file}:IMAGE_FOLDER."
    )


def locate_images(
    json_file: Path,
    folder: Path,
    images: Sequence[dict],
    findings: Findings,
    trust_paths: bool = False,
) -> list[dict]:
    """The images with the `file_name`, relative to `folder` or absolute, under which they are.

    A name is taken as it stands, then with backslashes as separators, then, if no other image has
    the same one, without its folders.

    Raises:
        MissingFileError: files that are not there, counted.
        InputError: a file outside `folder`, by its name or by a link, without `trust_paths`.
    """
    with _listings():
        located = _locate(json_file, folder, images, findings, trust_paths)
    paths = [os.path.join(folder, image["file_name"]) for image in located]
    require_files(json_file, "images", paths)
    return located


def _locate(
    json_file: Path, folder: Path, images: Sequence[dict], findings: Findings, trust_paths: bool
) -> list[dict]:
    bare = Counter(_bare(image["file_name"]) for image in images)
    located = []
    for index, image in enumerate(images):
        name, finding = image["file_name"], None
        if not _exists(folder, name):
            name, finding = _other_name(folder, name, bare)
        if not trust_paths and not _is_inside(folder / name, folder):
            raise InputError(
                f"{json_file}: {where('images', index, image)} has the file_name "
                f"{short(image['file_name'])}, which lies outside of the image folder {folder}. If "
                "that is meant, name a folder above it, as in coco:JSON:IMAGE_FOLDER, or set "
                "DATASETS.TRUST_PATHS True."
            )
        if finding is not None:
            findings.add(finding, where("images", index, image))
            image = {**image, "file_name": name}
        located.append(image)
    return located


def fill_in_sizes(folder: Path, images: Sequence[dict], findings: Findings) -> list[dict]:
    """The images with the sizes that their files have, where the JSON gives none."""
    filled = []
    for index, image in enumerate(images):
        if not image["width"] or not image["height"]:
            header = read_header(folder / image["file_name"])
            findings.add(SIZES, where("images", index, image))
            image = {**image, "width": header.width, "height": header.height}
        filled.append(image)
    return filled


def _names(name: str) -> list[str]:
    """The name as it stands and, if it has backslashes, with slashes and without a drive."""
    if "\\" not in name:
        return [name]
    return [name, ntpath.splitdrive(name)[1].replace("\\", "/")]


def _bare(name: str) -> str:
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def _other_name(folder: Path, name: str, bare: Counter[str]) -> tuple[str, str | None]:
    *_, with_slashes = _names(name)
    if with_slashes != name and not with_slashes.startswith("/"):
        if _exists(folder, with_slashes):
            return with_slashes, WINDOWS
    short = _bare(name)
    if short and short != name and bare[short] == 1 and _exists(folder, short):
        return short, BARE
    return name, None


def _exists(folder: Path, name: str) -> bool:
    path = os.path.join(folder, name)
    parent, last = os.path.split(path)
    return last in _entries(parent) or os.path.isfile(path)


@cache
def _entries(folder: str) -> dict[str, bool]:
    """The files of a folder, and whether each is a link. A listing costs less than many stats."""
    try:
        with os.scandir(folder) as entries:
            return {e.name: e.is_symlink() for e in entries if e.is_file()}
    except (OSError, ValueError):
        return {}


@cache
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file, all links followed, lies in a folder or below it."""
    parent, name = os.path.split(path)
    is_link = _entries(parent).get(name, True)
    real = os.path.realpath(path) if is_link else os.path.join(_real(parent), name)
    root = _real(str(folder))
    return real == root or real.startswith(root.rstrip("/") + "/")


@contextlib.contextmanager
def _listings() -> Iterator[None]:
    """Folders are listed once meanwhile. They may change between two data sets."""
    try:
        yield
    finally:
        _entries.cache_clear()
        _real.cache_clear()
