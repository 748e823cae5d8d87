"""Where a VOC folder keeps annotations, images and splits, and which images a split lists.

Found are Annotations/ + JPEGImages/ + ImageSets/Main/ in any case, annotations/ + images/, and XML
beside the images, in the folder itself or in one folder a split (train/, valid/, test/).
An image's id is its annotation's path below the annotations, without the ending.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from iou_d2.errors import InputError, MissingFileError

from .bounds import Bounds
from .cleaning import Findings

MENDED = "lines of the split were read without their flag, ending or folder"
_ANNOTATIONS = ("annotations", "xmls", "xml")
_IMAGES = ("jpegimages", "images", "imgs", "img")
_NO_IMAGES = {".xml", ".txt", ".json", ".csv", ".md", ".db", ".ini"}


class VocLayout(NamedTuple):
    folder: Path
    annotations: Path
    images: Path
    lists: Path | None  # ImageSets/Main

    @property
    def is_strict(self) -> bool:
        """Whether Detectron2's evaluator finds the annotations and splits."""
        main = self.folder / "ImageSets" / "Main"
        return self.annotations == self.folder / "Annotations" and self.lists == main


def find_layout(folder: Path, bounds: Bounds) -> VocLayout:
    """Raises MissingFileError where the folder holds neither of the known layouts."""
    if not folder.is_dir():
        raise MissingFileError(f"There is no folder {folder}.")
    annotations, images = _child(folder, _ANNOTATIONS), _child(folder, _IMAGES)
    sets = _child(folder, ("imagesets",))
    lists = sets and _child(sets, ("main",))
    if annotations is not None and images is not None:
        return VocLayout(folder, annotations, images, lists)
    if annotations is None and images is None and xml_files(folder, bounds):
        return VocLayout(folder, folder, folder, lists)
    part = "Annotations" if annotations is None else "JPEGImages"
    raise MissingFileError(f"{folder} is not a Pascal VOC folder: it has no {part}/.")


def xml_files(annotations: Path, bounds: Bounds) -> dict[str, Path]:
    """Annotations by image id, sorted; hidden files and folders are left out."""
    found = bounds.files_below(annotations)
    files = (path for path in found if path.suffix.lower() == ".xml")
    return {path.relative_to(annotations).with_suffix("").as_posix(): path for path in files}


def image_files(images: Path, bounds: Bounds) -> dict[str, list[Path]]:
    """All that may be images, by their path below `images` without the ending."""
    found: dict[str, list[Path]] = {}
    for path in bounds.files_below(images):
        if path.suffix.lower() not in _NO_IMAGES:
            key = path.relative_to(images).with_suffix("").as_posix()
            found.setdefault(key, []).append(path)
    return found


def read_split(
    layout: VocLayout,
    split: str | None,
    known: Sequence[str],
    bounds: Bounds,
    findings: Findings,
) -> list[str]:
    """The ids of the images of a split, in its order; those of no annotation are told later.

    The lists of one class, as VOC writes them (`000005 -1`), say with 1, 0 or -1 whether it is on
    the image. All images that they list are taken, for one without the class is an example too.
    """
    if layout.lists is None:
        return _split_by_folder(layout, split, known)
    if split is None:
        raise InputError(f"Name a split, as in voc:{layout.folder}:SPLIT; {_splits(layout.lists)}")
    file = layout.lists / f"{split}.txt"
    if not file.is_file():
        raise MissingFileError(f"There is no split file {file}; {_splits(layout.lists)}")
    bounds.require(file)
    lines = [line.strip() for line in _read_text(file).splitlines()]
    image_ids, all_known = [], set(known)
    for line in filter(None, lines):
        image_id = _image_id(line, all_known)
        if image_id != line:
            findings.add(MENDED, f"{file.name}, '{line}'")
        image_ids.append(image_id)
    if not image_ids:
        raise InputError(f"{file} lists no image.")
    _refuse_twice(file, image_ids)
    return image_ids


def _split_by_folder(layout: VocLayout, split: str | None, known: Sequence[str]) -> list[str]:
    if split is not None:
        listed = [image_id for image_id in known if image_id.startswith(f"{split}/")]
        if not listed:
            raise MissingFileError(
                f"There is no split file ImageSets/Main/{split}.txt in {layout.folder}, "
                f"and no annotation in {layout.annotations / split}."
            )
        return listed
    parts = sorted({image_id.partition("/")[0] for image_id in known if "/" in image_id})
    if layout.annotations == layout.folder and len(parts) > 1:
        raise InputError(
            f"Name a split, as in voc:{layout.folder}:SPLIT; "
            f"the splits there are {', '.join(parts)}."
        )
    return list(known)


def _image_id(line: str, known: set[str]) -> str:
    """The first reading of a line that has an annotation; the line without its flag if none has."""
    plain = re.sub(r"\s+(-1|0|1)$", "", line)
    for text in (line, plain):
        path = text.replace("\\", "/").removeprefix("./")
        for candidate in (text, path, re.sub(r"\.\w{2,5}$", "", path)):
            below = re.sub(r"^.*?(?:jpegimages|images|annotations)/", "", candidate, flags=re.I)
            for image_id in (candidate, below, candidate.rpartition("/")[2]):
                if image_id in known:
                    return image_id
    return plain


def _refuse_twice(file: Path, image_ids: Iterable[str]) -> None:
    seen: set[str] = set()
    for image_id in image_ids:
        if image_id in seen:
            raise InputError(f"{file} lists the image {image_id} twice.")
        seen.add(image_id)


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeError as error:
        raise InputError(f"{file} is not UTF-8 text: {error}.") from error


def _splits(lists: Path) -> str:
    names = sorted(path.stem for path in lists.glob("*.txt"))
    return f"the splits there are {', '.join(names)}." if names else "there is no other split."


def _child(folder: Path, names: Sequence[str]) -> Path | None:
    """The subfolder of one of `names` in any case, the first of them first."""
    found = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    return next((found[name] for name in names if name in found), None)
