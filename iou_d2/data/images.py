"""What the headers of image files say, and which files training could not use, before it starts.

Sides are in pixels as an image is shown, that is after it was turned as EXIF says.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image
from tqdm import tqdm

from iou_d2.errors import InputError

from .cleaning import write_text
from .image_bytes import bits_a_channel, is_cut_off, png_has_late_text

# EXIF orientations that turn an image by a quarter, so that its sides swap.
_QUARTER_TURNS = (5, 6, 7, 8)
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257  # tags

_CHUNK = 64  # images a task: a task each would cost more than reading the header


class Header(NamedTuple):
    """Sides in pixels as the image is shown, that is after it was turned as EXIF says."""

    width: int
    height: int
    mode: str  # Pillow's, such as "RGB" or "I;16"
    orientation: int  # of EXIF: 1 is upright
    bits: int = 8  # a channel, as the file says: Pillow opens 48-bit PNG and TIFF as "RGB"
    format: str = ""  # Pillow's, such as "JPEG"

    @property
    def sides_in_file(self) -> tuple[int, int]:
        """Width and height before EXIF turned them."""
        swapped = self.orientation in _QUARTER_TURNS
        return (self.height, self.width) if swapped else (self.width, self.height)


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of an image file.

    Raises InputError with the name of a file that is no image, whose header is damaged, or that has
    more pixels than Pillow opens. Damaged EXIF data is left out, as Detectron2 does.
    """
    try:
        with Image.open(path) as image:
            return _header_of(image)
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} has too many pixels: {error}") from error
    except Exception as error:  # Pillow raises half a dozen types
        raise InputError(f"{path} cannot be read as an image: {_first_line(error)}") from error


def usable_header(path: str | os.PathLike[str]) -> Header:
    """The header of an image that detectors can take, of 8 bits a channel.

    Everything that reads one picture calls this before it decodes it, for Pillow cuts deeper
    values off without a word. Whether all pixels are there is only known when they are decoded.

    Raises InputError with the name of a file that `read_header` refuses, that is deeper, in LAB, or
    a TIFF that EXIF turns, which would be turned twice.
    """
    header = read_header(path)
    fault = _pixel_fault(header)
    if fault is not None:
        raise InputError(f"{path} {fault}")
    return header


def check_images(
    dicts: Sequence[dict[str, Any]],
    cache_file: str | os.PathLike[str] | None = None,
    what: str = "the dataset",
    workers: int = 4,
) -> None:
    """Read the headers of all images of a dataset, so that a bad one is found before training.

    Found here: files that are missing, no images, or cut off at their end (JPEG, PNG, GIF, WebP,
    BMP and TIFF; a file whose end looks wrong is decoded to be sure); more than 8 bits a channel;
    too many pixels; another size than the annotations say. Pixels that are damaged in the middle
    of a file are found only when it is decoded, by the mapper. An empty dataset has no bad image.

    In training with several processes one of them should call this.

    Args:
        dicts: of Detectron2: "file_name", and "width" and "height" where they are known.
        cache_file: remembers that all images were good, for the next call with the same names,
            sizes in bytes, times of change and stated sides. A damaged one is not minded.
        what: the dataset, in the error. workers: threads, which help where files lie far away.

    Raises InputError that counts the bad images and describes the first three.
    """
    state = None if cache_file is None else _state(dicts)
    if state is not None and _read_cache(Path(cache_file)) == state:
        return
    faults: list[str] = []

    def chunk_faults(start: int) -> tuple[int, list[str]]:
        return _faults(dicts[start : start + _CHUNK])

    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(dicts), desc="Checking images", unit="image", delay=2) as progress,
    ):
        for size, found in pool.map(chunk_faults, range(0, len(dicts), _CHUNK)):
            faults += found
            progress.update(size)
    if faults:
        raise InputError(_summary(faults, len(dicts), what))
    if state is not None:
        write_text(Path(cache_file), state)


def _header_of(image: Image.Image) -> Header:
    bits = bits_a_channel(image)
    # The size of a TIFF is turned already, if Pillow is new enough.
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(_TIFF_WIDTH, image.width), tags.get(_TIFF_HEIGHT, image.height)
    # Pillow decodes a whole PNG to look for EXIF data after its pixels: only where there may be.
    decode = image.format != "PNG" or png_has_late_text(image.fp)
    try:
        exif = image.getexif() if decode else Image.Image.getexif(image)
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # as Detectron2 reads images
        orientation = 1
    if orientation in _QUARTER_TURNS:
        width, height = height, width
    return Header(width, height, image.mode, orientation, bits, image.format or "")


def _pixel_fault(header: Header) -> str | None:
    if header.mode.startswith(("I", "F")) or header.bits > 8:
        depth = header.mode if header.bits <= 8 else f"{header.mode}, {header.bits} bits"
        return f"has more than 8 bits a channel ({depth}): scale its values to 0..255 first."
    if header.mode == "LAB":
        return "is in the colours LAB, which cannot be turned into RGB: save it as RGB first."
    if header.format == "TIFF" and header.orientation in range(2, 9):
        return "is a TIFF that EXIF turns, which Pillow and Detectron2 both do: save it upright."
    return None


def _faults(dicts: Iterable[dict[str, Any]]) -> tuple[int, list[str]]:
    """The number of `dicts`, and a sentence for each image that cannot be used."""
    dicts = list(dicts)
    faults = (_fault(record) for record in dicts)
    return len(dicts), [fault for fault in faults if fault is not None]


def _fault(record: dict[str, Any]) -> str | None:
    path = record["file_name"]
    try:
        header = usable_header(path)
    except InputError as error:
        return str(error)
    if "width" in record and "height" in record:
        fault = size_fault(header, record["width"], record["height"])
        if fault is not None:
            return f"{path} {fault}"
    reason = _decoding_error(path) if is_cut_off(path) else None
    return None if reason is None else f"{path} does not decode, it is cut off: {reason}."


def size_fault(header: Header, width: int, height: int) -> str | None:
    """How an image differs from the sides that its annotations say, or None; begins with "is"."""
    if (header.width, header.height) == (width, height):
        return None
    shown, said = f"{header.width}x{header.height}", f"the annotations say {width}x{height}"
    if header.orientation in _QUARTER_TURNS:
        stored = "x".join(map(str, header.sides_in_file))
        return f"is {stored} in the file and EXIF turns it to {shown}, but {said}."
    if (header.height, header.width) == (width, height):
        return f"is {shown}, but {said}: the sides are swapped."
    if abs(header.width * height - header.height * width) <= max(width, height):
        return f"is {shown}, but {said}: it was scaled."
    return f"is {shown}, but {said}."


def _decoding_error(path: str) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _summary(faults: Sequence[str], total: int, what: str) -> str:
    first = " ".join(fault if fault.endswith(".") else f"{fault}." for fault in faults[:3])
    return f"{len(faults)} of the {total} images of {what} cannot be used, the first: {first}"


def _state(dicts: Sequence[dict[str, Any]]) -> str | None:
    """A digest of all that the check depends on; None where a file cannot be looked at."""
    digest = hashlib.sha256(b"1")  # another number when the check finds more
    try:
        for record in dicts:
            found = os.stat(record["file_name"])
            sides = record.get("width"), record.get("height")
            row = (str(record["file_name"]), found.st_size, found.st_mtime_ns, *sides)
            digest.update(repr(row).encode("utf-8", "surrogateescape"))
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return None
    return digest.hexdigest()


def _read_cache(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
