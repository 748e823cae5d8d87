"""What Pillow does not tell of an image file: whether its end is there, and how deep it is."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from PIL import Image

_TAIL = 64  # bytes: some programs pad their files
_PNG = b"\x89PNG\r\n\x1a\n"
_SIZ = b"\xff\x4f\xff\x51"  # the head of a JPEG 2000 stream
_BITS_PER_SAMPLE, _STARTS, _COUNTS = 258, (273, 324), (279, 325)  # TIFF tags, strips and tiles


def bits_a_channel(image: Image.Image) -> int:
    """Bits of the deepest channel, as the file says; 8 for formats that know nothing else.

    `image` is open and not decoded. PPM with larger values is scaled by Pillow and counts as 8.
    """
    if image.format == "PNG":
        return _at(image.fp, 24, 1)[0]  # IHDR is the first chunk: signature, length, name, sides
    if image.format == "TIFF":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, 8)
        return max(bits) if isinstance(bits, tuple) else int(bits)
    if image.format == "JPEG2000":
        head = _at(image.fp, 0, 4096)
        start = head.find(_SIZ)
        first_component = start + 42  # after the marker, the sides of image and tiles, the count
        if start >= 0 and first_component < len(head):
            return (head[first_component] & 0x7F) + 1
    return 8


def png_has_late_text(file: BinaryIO) -> bool:
    """Whether chunks that may hold EXIF or XMP data follow the pixels; True for a damaged file."""
    position, pixels_seen = file.tell(), False
    try:
        for name in _png_chunks(file):
            pixels_seen = pixels_seen or name == b"IDAT"
            if pixels_seen and name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
        return False
    finally:
        file.seek(position)


def is_cut_off(path: str | os.PathLike[str]) -> bool:
    """Whether the end of an image file looks wrong; it may still be good, so decode it to be sure.

    Knows JPEG, PNG, GIF, WebP, BMP and TIFF; of other formats it says False.
    """
    with open(path, "rb") as file:
        head = file.read(16)
        size = file.seek(0, os.SEEK_END)
        if head.startswith(b"\xff\xd8"):
            return b"\xff\xd9" not in _at(file, max(0, size - _TAIL), _TAIL)
        if head.startswith(_PNG):
            return b"IEND" not in _at(file, max(0, size - _TAIL), _TAIL)
        if head.startswith(b"GIF8"):
            return b"\x3b" not in _at(file, max(0, size - _TAIL), _TAIL)
        if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
            return struct.unpack("<I", head[4:8])[0] + 8 > size
        if head.startswith(b"BM"):
            return struct.unpack("<I", head[2:6])[0] > size
    return head[:4] in (b"II*\0", b"MM\0*") and _tiff_end(path) > size


def _tiff_end(path: str | os.PathLike[str]) -> int:
    """The byte after the last strip or tile of the first picture of a TIFF file."""
    with Image.open(path) as image:
        tags = getattr(image, "tag_v2", {})
        starts, counts = (
            [value for tag in pair for value in _numbers(tags.get(tag, ()))]
            for pair in (_STARTS, _COUNTS)
        )
    return max((start + count for start, count in zip(starts, counts)), default=0)


def _numbers(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _png_chunks(file: BinaryIO) -> list[bytes]:
    """Names of all chunks, in order, up to the end of the file."""
    names, position = [], len(_PNG)
    while len(head := _at(file, position, 8)) == 8:
        length, name = struct.unpack(">I4s", head)
        names.append(name)
        position += length + 12  # length, name and check sum
    return names


def _at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)
