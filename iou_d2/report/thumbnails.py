"""Small pictures inside the page, within a number of bytes."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image, ImageOps

from iou_d2.data.images import usable_header
from iou_d2.errors import InputError

SIDE = 320  # pixels of the longer side
_MISSING = "The image is not there."
# From what looks best to what is small. Sides, and qualities of JPEG.
_STEPS = ((SIDE, 82), (SIDE, 65), (256, 60), (192, 55), (128, 50))


class Thumbnails:
    """Pictures by the file that they are of, each once whatever takes it.

    Attributes:
        data: their data URIs.
        missing: files that are not there. broken: files that cannot be shown.
    """

    def __init__(self, largest: int):
        """`largest`: characters of one picture; one that cannot be so small is left out."""
        self.data: list[str] = []
        self.missing: set[str] = set()
        self.broken: set[str] = set()
        self._largest = largest
        self._known: dict[Path, tuple[int, str, tuple[int, int] | None]] = {}

    def take(self, file: Path | None) -> tuple[int, str, tuple[int, int] | None]:
        """The place of a picture in `data`, or -1; a sentence that says why there is none; and the
        sides (width, height) of the image, or None."""
        if file is None:
            return -1, "No folder of images was given.", None
        if file not in self._known:
            self._known[file] = self._read(file)
        return self._known[file]

    def _read(self, file: Path) -> tuple[int, str, tuple[int, int] | None]:
        try:
            if not file.is_file():
                self.missing.add(str(file))
                return -1, _MISSING, None
            header = usable_header(file)
            text = self._shrunk(file)
        except InputError as error:
            self.broken.add(str(file))
            return -1, str(error), None
        except Exception as error:  # Pillow raises half a dozen types
            self.broken.add(str(file))
            return -1, f"The image cannot be read: {error}", None
        if text is None:
            return -1, "The picture is too large for the page.", (header.width, header.height)
        self.data.append(text)
        return len(self.data) - 1, "", (header.width, header.height)

    def _shrunk(self, file: Path) -> str | None:
        with Image.open(file) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # JPEG is decoded at a smaller size, and fast
            picture = ImageOps.exif_transpose(image).convert("RGB")
        for side, quality in _STEPS:
            picture.thumbnail((side, side))
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=quality, optimize=True)
            text = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
            if len(text) <= self._largest:
                return text
        return None
