"""Pictures as commands read them, beside Detectron2's `read_image`, as training reads them."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image

from iou_d2.commands.pictures import read_picture


def save(path, mode: str, orientation: int = 1) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).convert(mode).save(path, exif=exif)
    return str(path)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 77])
def test_pictures_are_turned_as_exif_says(tmp_path, ending, orientation):
    path = save(tmp_path / f"x.{ending}", "RGB", orientation)
    expected = read_image(path, format="BGR")
    assert expected.shape == ((14, 9, 3) if orientation in (5, 6, 7, 8) else (9, 14, 3))
    assert np.array_equal(read_picture(path), expected)


@pytest.mark.parametrize("name", ["L.jpg", "CMYK.jpg", "1.png", "L.png", "LA.png", "P.png"])
def test_pictures_of_any_mode_are_bgr(tmp_path, name):
    path = save(tmp_path / name, name.split(".")[0])
    found = read_picture(path)
    assert found.shape == (9, 14, 3) and found.dtype == np.uint8
    assert np.array_equal(found, read_image(path, format="BGR"))


def test_damaged_exif_data_is_left_out(tmp_path):
    path = tmp_path / "x.jpg"
    save(path, "RGB", 6)
    path.write_bytes(path.read_bytes().replace(b"MM\x00*", b"MM\x00!", 1))
    assert np.array_equal(read_picture(path), read_image(str(path), format="BGR"))
