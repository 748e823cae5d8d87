"""Images: headers, the mapper of training and the pictures of `iou-d2 detect`."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iou_d2.commands.pictures import read_picture
from iou_d2.data.images import check_images, read_header
from iou_d2.data.mapper import CheckedDatasetMapper
from iou_d2.errors import InputError

from .judge import READ, Surface, Try, refused, require
from .mutate import edit_bytes

ENDINGS = ("png", "jpg", "gif", "bmp", "webp", "tiff", "ppm")
MODES = ("RGB", "L", "P", "RGBA", "CMYK", "I;16", "1", "LA", "F", "I")


def prepare(folder: Path) -> list[tuple[str, bytes]]:
    """Small files of every ending and mode that Pillow writes, some with an EXIF orientation."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 36, 3), np.uint8)
    found = []
    for ending in ENDINGS:
        for mode in MODES:
            for orientation in (None, 6):
                data = _written(pixels, ending, mode, orientation)
                if data is not None:
                    found.append((ending, data))
    return found


def _written(pixels, ending: str, mode: str, orientation: int | None) -> bytes | None:
    image, stream = Image.fromarray(pixels), io.BytesIO()
    settings = {}
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        settings["exif"] = exif
    try:
        image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
        image.save(stream, {"jpg": "JPEG"}.get(ending, ending.upper()), **settings)
    except (OSError, ValueError, KeyError):
        return None
    return stream.getvalue()


def _png_of_size(width: int, height: int, depth: int, color: int) -> bytes:
    """A PNG that says it is so large, and holds hardly any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    text = chunk(b"zTXt", b"x\0\0" + zlib.compress(b"\0" * 5_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + text + body + chunk(b"IEND", b"")


def make(prepared: list, one: Try) -> Path:
    plan = one.plan
    ending, data = prepared[plan.special % len(prepared)]
    if plan.special % 13 == 0:
        side, other = (1, 30_000, 2**31 - 1, 0, 9000)[plan.special // 13 % 5], plan.edits[0].other
        depth, color = ((8, 2), (16, 2), (8, 0), (1, 0), (8, 3), (3, 7))[plan.special // 65 % 6]
        ending, data = "png", _png_of_size(side, 1 + other % 40_000, depth, color)
    elif plan.special % 13 < 11:  # the rest stays whole
        data = edit_bytes(data, plan.edits)
    path = one.folder / f"image.{ending if plan.special % 7 else 'jpg'}"
    path.write_bytes(data)
    return path


@lru_cache(maxsize=1)
def _mapper() -> CheckedDatasetMapper:
    return CheckedDatasetMapper(
        is_train=False, augmentations=[], image_format="BGR", use_instance_mask=False
    )


def judge_mapper(path: Path) -> str:
    warnings.simplefilter("ignore")
    record: dict[str, Any] = {"file_name": str(path), "image_id": 1}
    try:
        header = read_header(path)
        record.update(width=header.width, height=header.height)
        check_images([record])
        image = _mapper()(record)["image"]
    except InputError as error:
        return refused(error, path.name)
    require(tuple(image.shape) == (3, header.height, header.width), f"{tuple(image.shape)}")
    require(str(image.dtype) == "torch.uint8", f"pixels are {image.dtype}")
    return READ


def judge_picture(path: Path) -> str:
    warnings.simplefilter("ignore")
    try:
        image = read_picture(path)
    except InputError as error:
        return refused(error, path.name)
    header = read_header(path)
    require(image.shape == (header.height, header.width, 3), f"the picture is {image.shape}")
    require(image.dtype == np.uint8, f"pixels are {image.dtype}")
    return READ


SURFACES = {
    name: Surface(name, what, tries=2500, prepare=prepare, make=make, judge=judge)
    for name, what, judge in (
        ("images", "headers and the mapper of training: the size of the header", judge_mapper),
        ("detect", "pictures of `iou-d2 detect`: the same", judge_picture),
    )
}
