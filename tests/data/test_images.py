"""Image files that training could not use are found by their headers; good ones pass."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageOps, PngImagePlugin

from iou_d2.data.images import check_images, read_header, usable_header
from iou_d2.errors import InputError

WIDTH, HEIGHT = 64, 48
SUFFIXES = ["jpg", "png", "gif", "webp", "bmp", "tif"]


def noise() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(values)


def write_image(file: Path, **options) -> Path:
    noise().save(file, **options)
    return file


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def record(file: Path, width: int = WIDTH, height: int = HEIGHT) -> dict:
    return {"file_name": str(file), "image_id": 7, "width": width, "height": height}


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def write_png(file: Path, bits: int, colour_type: int, width: int = 8, height: int = 8) -> Path:
    """A PNG made by hand: Pillow does not write 16 bits in colour."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    rows = (b"\0" + bytes(width * channels * bits // 8)) * height
    head = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = (b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    return file


def write_deep_tiff(file: Path) -> Path:
    """A TIFF of 16 bits in three colours, made by hand."""
    tags = [
        (256, 4),
        (257, 4),
        (258, 0),
        (259, 1),
        (262, 2),
        (273, 0),
        (277, 3),
        (278, 4),
        (279, 96),
    ]
    bits_at = 8 + 2 + 12 * len(tags) + 4
    values = {258: bits_at, 273: bits_at + 6}
    rows = b"".join(
        struct.pack(
            "<HHII", tag, 3 if tag == 258 else 4, 3 if tag == 258 else 1, values.get(tag, v)
        )
        for tag, v in tags
    )
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + rows + struct.pack("<I", 0)
    file.write_bytes(head + struct.pack("<HHH", 16, 16, 16) + bytes(96))
    return file


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_good_images(tmp_path, suffix):
    file = write_image(tmp_path / f"a.{suffix}")
    assert read_header(file)[:2] == (WIDTH, HEIGHT) and read_header(file).bits <= 8
    check_images([record(file)] * 200)


def test_no_image_at_all():
    check_images([])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_sides_are_those_that_detectron2_sees(tmp_path, suffix, orientation):
    file = write_image(tmp_path / f"a.{suffix}", exif=oriented(orientation))
    header = read_header(file)
    assert (header.height, header.width) == read_image(str(file), "BGR").shape[:2]
    assert header.orientation == orientation and header.sides_in_file == (WIDTH, HEIGHT)


@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_a_tiff_is_never_turned_twice(tmp_path, orientation):
    file = write_image(tmp_path / "a.tif", exif=oriented(orientation))
    with Image.open(file) as image:
        assert read_header(file)[:2] == ImageOps.exif_transpose(image).size
    with pytest.raises(InputError, match=r"a\.tif is a TIFF that EXIF turns"):
        usable_header(file)


def test_exif_after_the_pixels_of_a_png(tmp_path):
    file = write_image(tmp_path / "a.png")
    end = file.read_bytes().rindex(b"IEND") - 4
    data = file.read_bytes()
    exif = png_chunk(b"eXIf", oriented(6).tobytes()[6:])
    file.write_bytes(data[:end] + exif + data[end:])
    assert read_header(file)[:2] == (HEIGHT, WIDTH)


def test_damaged_exif_is_left_out(tmp_path):
    file = write_image(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    assert read_header(file) == (WIDTH, HEIGHT, "RGB", 1, 8, "JPEG")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.9, -1])
def test_cut_files(tmp_path, suffix, keep):
    """Where Pillow decodes the cut file all the same, as a GIF without its end, it is good."""
    file = write_image(tmp_path / f"a.{suffix}")
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    try:
        with Image.open(file) as image:
            image.load()
    except Exception:
        with pytest.raises(InputError, match=r"1 of the 1 images of .*a\.\w+ (does not|cannot)"):
            check_images([record(file)])
    else:
        check_images([record(file)])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("trailer", [b"\0", b"\0" * 5000, b"\r\n", b"appended video" * 1000])
def test_bytes_after_the_end_are_no_fault(tmp_path, suffix, trailer):
    file = write_image(tmp_path / f"a.{suffix}")
    file.write_bytes(file.read_bytes() + trailer)
    check_images([record(file)])


@pytest.mark.parametrize("text", ["", "<html>404</html>", "version https://git-lfs.github.com"])
def test_text_instead_of_an_image(tmp_path, text):
    file = tmp_path / "a.jpg"
    file.write_text(text)
    with pytest.raises(InputError, match=r"a\.jpg cannot be read as an image"):
        check_images([record(file)])


def test_missing_file_and_folder(tmp_path):
    for file in (tmp_path / "gone.jpg", tmp_path):
        with pytest.raises(InputError, match=f"{file.name} cannot be read as an image"):
            check_images([record(file)], tmp_path / "cache")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_grey_images(tmp_path, dtype):
    file = tmp_path / "deep.tif"
    Image.fromarray(np.zeros((HEIGHT, WIDTH), dtype)).save(file)
    with pytest.raises(InputError, match=r"deep\.tif has more than 8 bits a channel"):
        usable_header(file)
    with pytest.raises(InputError, match=r"deep\.tif has more than 8 bits a channel"):
        check_images([record(file)])


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])
def test_deep_png(tmp_path, colour_type):
    usable_header(write_png(tmp_path / "good.png", 8, colour_type))
    deep = write_png(tmp_path / "deep.png", 16, colour_type)
    with pytest.raises(InputError, match=r"deep\.png has more than 8 bits a channel \(.*16 bits\)"):
        usable_header(deep)


def test_deep_colour_tiff(tmp_path):
    file = write_deep_tiff(tmp_path / "deep.tif")
    with Image.open(file) as image:
        assert image.mode == "RGB"  # Pillow says nothing of the depth
    with pytest.raises(InputError, match=r"more than 8 bits a channel \(RGB, 16 bits\)"):
        usable_header(file)


def test_colours_that_cannot_be_turned_into_rgb(tmp_path):
    file = tmp_path / "a.tif"
    Image.new("LAB", (WIDTH, HEIGHT)).save(file)
    with pytest.raises(InputError, match="LAB"):
        usable_header(file)


def test_too_many_pixels(tmp_path):
    file = write_png(tmp_path / "huge.png", 8, 0)
    head = struct.pack(">IIBBBBB", 14000, 13000, 8, 0, 0, 0, 0)
    data = file.read_bytes()
    file.write_bytes(data[:8] + png_chunk(b"IHDR", head) + data[33:])
    with pytest.raises(InputError, match=r"huge\.png has too many pixels: .*182000000"):
        check_images([record(file, 14000, 13000)])


def test_large_text_in_a_png_is_a_sentence(tmp_path):
    """Pillow refuses texts that unpack to more than a megabyte."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 2_000_000, zip=True)
    file = write_image(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(InputError, match=r"a\.png cannot be read as an image"):
        check_images([record(file)])


@pytest.mark.parametrize(
    ("orientation", "sides", "sentence"),
    [
        (1, (HEIGHT, WIDTH), "is 64x48, but the annotations say 48x64: the sides are swapped."),
        (1, (128, 96), "is 64x48, but the annotations say 128x96: it was scaled."),
        (1, (32, 24), "is 64x48, but the annotations say 32x24: it was scaled."),
        (1, (100, 10), "is 64x48, but the annotations say 100x10."),
        (3, (HEIGHT, WIDTH), "the sides are swapped."),
        (
            6,
            (WIDTH, HEIGHT),
            "is 64x48 in the file and EXIF turns it to 48x64, but the annotations",
        ),
    ],
)
def test_other_size_than_the_annotations_say(tmp_path, orientation, sides, sentence):
    file = write_image(tmp_path / "a.jpg", exif=oriented(orientation))
    with pytest.raises(InputError) as error:
        check_images([record(file, *sides)], what="coco:a.json")
    assert f"1 of the 1 images of coco:a.json cannot be used, the first: {file} " in str(
        error.value
    )
    assert sentence in str(error.value)


def test_records_without_sides_are_checked_for_the_rest(tmp_path):
    check_images([{"file_name": str(write_image(tmp_path / "a.jpg"))}])


def test_three_of_many_are_described(tmp_path):
    good = write_image(tmp_path / "good.jpg")
    records = [record(good)] * 300 + [record(tmp_path / f"gone{i}.jpg") for i in range(70)]
    with pytest.raises(
        InputError, match=r"70 of the 370 .*gone0\.jpg .*gone1\.jpg .*gone2"
    ) as error:
        check_images(records)
    assert "gone3" not in str(error.value)


class TestCache:
    @pytest.fixture
    def files(self, tmp_path):
        return [write_image(tmp_path / f"{i}.jpg") for i in range(3)]

    @pytest.fixture
    def reads(self, monkeypatch):
        """Names of the files whose headers are read."""
        from iou_d2.data import images

        names, read = [], images.read_header
        monkeypatch.setattr(images, "read_header", lambda path: names.append(path) or read(path))
        return names

    def test_unchanged_files_are_read_once(self, tmp_path, files, reads):
        for _ in range(2):
            check_images([record(file) for file in files], tmp_path / "run" / "cache")
        assert len(reads) == 3
        assert [file.name for file in (tmp_path / "run").iterdir()] == ["cache"]

    def test_a_changed_file_is_found(self, tmp_path, files):
        check_images([record(file) for file in files], tmp_path / "cache")
        data, stat = files[1].read_bytes(), files[1].stat()
        files[1].write_bytes(b"\0" * len(data))
        os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        with pytest.raises(InputError, match=r"1\.jpg"):
            check_images([record(file) for file in files], tmp_path / "cache")

    def test_changed_sides_are_found(self, tmp_path, files):
        check_images([record(file) for file in files], tmp_path / "cache")
        with pytest.raises(InputError, match="3 of the 3"):
            check_images([record(file, 10, 11) for file in files], tmp_path / "cache")

    @pytest.mark.parametrize("damage", [b"", b"\xff\xfe\0", b"good"])
    def test_a_damaged_cache_is_not_minded(self, tmp_path, files, reads, damage):
        (tmp_path / "cache").write_bytes(damage)
        for _ in range(2):
            check_images([record(file) for file in files], tmp_path / "cache")
        assert len(reads) == 3

    def test_bad_images_are_not_remembered(self, tmp_path, files):
        files[0].write_text("no image")
        for _ in range(2):
            with pytest.raises(InputError, match=r"0\.jpg"):
                check_images([record(file) for file in files], tmp_path / "cache")
