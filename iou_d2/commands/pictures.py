"""Pictures as commands read and write them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from iou_d2.data.images import usable_header
from iou_d2.errors import InputError, MissingFileError

# What OpenCV writes under its own ending; every other picture is written as PNG.
WRITTEN_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}
# EXIF orientation -> what turns the picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(path: str | os.PathLike) -> np.ndarray:
    """(H, W, 3) uint8 BGR, turned as EXIF says: what Detectron2's `read_image` gives.

    Raises InputError with the name of a file that is not there, is no image, is damaged, has too
    many pixels or more than 8 bits a channel, of which Pillow would cut off all above 255.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise MissingFileError(f"There is no image {path}.")
    header = usable_header(path)
    try:
        with Image.open(path) as image:
            if header.orientation in _TURNS:
                image = image.transpose(_TURNS[header.orientation])
            return np.asarray(image.convert("RGB"))[:, :, ::-1]
    except Exception as error:  # Pillow raises half a dozen types
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def write_picture(path: Path, image: np.ndarray) -> None:
    try:
        written = cv2.imwrite(str(path), image)
    except cv2.error:
        written = False
    if not written:
        raise InputError(f"The picture {path} cannot be written.")


def picture_names(files: Sequence[str]) -> list[str]:
    """The name of the drawn picture of each file: its own, of another ending than OpenCV writes
    with .png in its place; equal ones are told apart by a number."""
    names = []
    for file in files:
        stem, ending = os.path.splitext(os.path.basename(file))
        names.append(stem + (ending if ending.lower() in WRITTEN_ENDINGS else ".png"))
    return unlike_names(names)


def unlike_names(names: Sequence[str]) -> list[str]:
    """`names` of files, of which equal ones are told apart by a number: x.png, x_2.png."""
    unlike, taken = [], set()
    for wanted in names:
        stem, ending = os.path.splitext(wanted)
        name, number = wanted, 1
        while name in taken:
            number += 1
            name = f"{stem}_{number}{ending}"
        taken.add(name)
        unlike.append(name)
    return unlike
