"""What the COCO and VOC readers share: mending boxes, files that must be there, mended copies.

Boxes are XYXY in absolute pixels of the image; (0, 0) is the outer corner of its first pixel.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from iou_d2.errors import MissingFileError

Box = tuple[float, float, float, float]

NO_AREA = "boxes without area were dropped"
OUTSIDE = "boxes outside their image were dropped"
CLIPPED = "boxes were clipped to their image"

# Rounding, or counting pixels from one, pushes good boxes over the edge by up to a pixel. They stay
# as they are, so that COCO's own files give exactly COCO's numbers.
OVERSHOOT = 1.0


@dataclass(frozen=True)
class Trust:
    """What a user insists on: see DATASETS.TRUST_* in iou_d2/config_keys.py."""

    boxes: bool = False
    paths: bool = False


NO_TRUST = Trust()


class Findings:
    """What was mended in one dataset: how often each kind, and the first record of it.

    Attributes:
        groups: the names of all categories that were dropped as groups.
    """

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.groups: list[str] = []

    def add(self, kind: str, record: str) -> None:
        self.count[kind] += 1
        self.first.setdefault(kind, record)

    def __bool__(self) -> bool:
        return bool(self.count)

    def __str__(self) -> str:
        parts = (f"{n} {kind} (first: {self.first[kind]})" for kind, n in self.count.items())
        return "; ".join(parts)


def clean_box(box: Box, width: int, height: int) -> tuple[Box | None, str | None]:
    """Judge one box (XYXY, pixels) against its image of `width` x `height` pixels.

    Returns the box to keep, or None, and what was done to it: NO_AREA, OUTSIDE, CLIPPED or None.
    Inverted boxes have no area; up to OVERSHOOT pixels beyond the edge are left alone.
    """
    x0, y0, x1, y1 = box
    if x1 <= x0 or y1 <= y0:
        return None, NO_AREA
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        return None, OUTSIDE
    if min(x0, y0) >= -OVERSHOOT and x1 <= width + OVERSHOOT and y1 <= height + OVERSHOOT:
        return box, None
    return (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))), CLIPPED


def missing_files(paths: Sequence[str]) -> list[str]:
    """The paths that are no files. Each folder is listed once: fewer calls than a stat each."""

    @cache
    def files_in(folder: str) -> frozenset[str]:
        try:
            with os.scandir(folder or ".") as entries:
                return frozenset(entry.name for entry in entries if entry.is_file())
        except OSError:
            return frozenset()

    # The second look is for file systems that do not mind upper and lower case.
    return [
        path
        for path in paths
        if os.path.basename(path) not in files_in(os.path.dirname(path))
        and not os.path.isfile(path)
    ]


def require_files(source: Path, what: str, paths: Sequence[str]) -> None:
    """Raise MissingFileError that counts the missing `paths` and names three, if there are any."""
    missing = missing_files(paths)
    if missing:
        raise MissingFileError(
            f"{len(missing)} of the {len(paths)} {what} that {source} lists are not there, "
            f"the first: {', '.join(map(shortened, missing[:3]))}."
        )


def shortened(path: str) -> str:
    """`path` as a sentence can hold it."""
    return path if len(path) <= 500 else f"{path[:200]}... ({len(path)} characters)"


def copy_name(stem: str, dataset: str) -> str:
    """A file name for the mended copy of `dataset`, unlike that of any other dataset."""
    return f"{stem}-{hashlib.sha256(dataset.encode()).hexdigest()[:8]}"


def write_text(path: Path, text: str) -> None:
    """Write all of `path` or nothing, for the processes of one run all write the same file."""
    write_parts(path, [text])


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """`write_text` of a text that comes in parts. What a failure leaves unfinished is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
