"""What the header of an image file says, without decoding its pixels."""

from __future__ import annotations

import os
from typing import NamedTuple

from PIL import ExifTags, Image

from iou_d2.errors import InputError

# EXIF orientations that turn an image by a quarter, so that its sides swap.
_QUARTER_TURNS = (5, 6, 7, 8)


class Header(NamedTuple):
    """Sides in pixels as the image is shown, that is after it was turned as EXIF says."""

    width: int
    height: int
    mode: str  # Pillow's, such as "RGB" or "I;16"
    orientation: int  # of EXIF: 1 is upright


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of an image file.

    Raises InputError with the name of a file that is no image or whose header is damaged.
    """
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            width, height, mode = image.width, image.height, image.mode
    except Exception as error:  # Pillow raises half a dozen types
        raise InputError(f"{path} cannot be read as an image: {error}") from error
    if orientation in _QUARTER_TURNS:
        width, height = height, width
    return Header(width, height, mode, orientation)
