"""The generated dataset `shapes`: names, COCO JSON and PNG files on disk, registration.

A name is `shapes_<split>` or `shapes_<split>_<images>x<pixels>`, with split `train` or `val`:
`shapes_train` has 1000 images and `shapes_val` 200, of 256 x 256 pixels; `shapes_train_5000x128`
has 5000 of 128 x 128. A long set begins with the images of a short set of its split and pixels.

The data are made at first use, under `$DETECTRON2_DATASETS` (default `datasets`), which is read at
registration: `shapes/<name>/images/*.png` and `shapes/<name>/instances.json`. One seed gives the
same bytes, as long as NumPy and OpenCV stay the same. A folder that is not the complete set of its
name is replaced: delete it to have it made anew.

Boxes (COCO XYWH, whole pixels) are the tight extent of the whole object, also of what other objects
or occluders hide. Only the border of the image cuts a box, as in COCO. Segmentations, in COCO's
compressed RLE, and areas are of the same whole objects. A crowd region is one annotation with
iscrowd 1.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from pycocotools import mask as mask_util
from tqdm import tqdm

from iou_d2.errors import InputError

from .shapes_image import CLASSES, Annotation, make_image

VERSION = 1  # raise it when the same seed gives other bytes, so that folders on disk are made anew
BASE_NAMES = ("shapes_train", "shapes_val")

_SPLITS = ("train", "val")
_BASE_IMAGES = {"train": 1000, "val": 200}
_NAME = re.compile(r"shapes_(train|val)(?:_([1-9]\d*)x([1-9]\d*))?")
_CHUNK = 64  # images in flight; bounds the memory


@dataclass(frozen=True)
class ShapesSpec:
    """What determines every byte of a set. Raises InputError when a value is out of its range."""

    split: str
    images: int
    pixels: int = 256
    seed: int = 0

    def __post_init__(self):
        if self.split not in _SPLITS:
            raise InputError(f"The split of a shapes dataset is train or val, not {self.split!r}.")
        if self.images < 1:
            raise InputError(f"A shapes dataset has at least 1 image, not {self.images}.")
        if not 64 <= self.pixels <= 4096:
            raise InputError(f"Images of shapes have 64 to 4096 pixels a side, not {self.pixels}.")
        if self.seed < 0:
            raise InputError(f"The seed of a shapes dataset is at least 0, not {self.seed}.")


def parse_shapes_name(name: str) -> ShapesSpec:
    """The set that a name stands for; raises InputError when it does not follow the grammar."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(
            f"{name!r} is not a name of a shapes dataset: write shapes_train, shapes_val or, for "
            "example, shapes_train_5000x128 for 5000 images of 128 x 128 pixels."
        )
    split, images, pixels = match.groups()
    if images is None:
        return ShapesSpec(split, _BASE_IMAGES[split])
    return ShapesSpec(split, int(images), int(pixels))


# ---------------------------------------------------------------------------- registration


def register_shapes() -> None:
    """Register `shapes_train` and `shapes_val`; makes no data. A second call does nothing."""
    for name in BASE_NAMES:
        register_shapes_by_name(name)


def register_shapes_by_name(name: str) -> bool:
    """Register a set of any size, not made yet; False when `name` does not begin with `shapes_`.

    Raises InputError for a name that begins so and does not follow the grammar.
    """
    if not name.startswith("shapes_"):
        return False
    if name in DatasetCatalog.list():
        return True
    parse_shapes_name(name)
    root = Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
    folder = root / "shapes" / name
    DatasetCatalog.register(name, partial(_load, name))
    MetadataCatalog.get(name).set(
        json_file=str(folder / "instances.json"),
        image_root=str(folder / "images"),
        evaluator_type="coco",
        thing_classes=list(CLASSES),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
    )
    return True


def ensure_shapes(name: str) -> None:
    """Make the data of a shapes name, if they are missing; other datasets' names are left alone.

    Call it before a `COCOEvaluator` is built: that reads the JSON file before any data are loaded.
    """
    if _NAME.fullmatch(name) and register_shapes_by_name(name):
        write_shapes(parse_shapes_name(name), Path(MetadataCatalog.get(name).json_file).parent)


def _load(name: str) -> list[dict]:
    """Detectron2's dataset dicts of a registered set."""
    ensure_shapes(name)
    metadata = MetadataCatalog.get(name)
    return load_coco_json(metadata.json_file, metadata.image_root, name)


# ---------------------------------------------------------------------------- files


def write_shapes(spec: ShapesSpec, folder: str | os.PathLike) -> None:
    """Make the set in `folder`, unless it is there complete; replaces anything else found there.

    Several processes may call it at once: one makes the set, the others wait. A killed call leaves
    `<folder>.partial`, which the next one removes. Raises OSError with the path if it cannot write.
    """
    folder = Path(folder).absolute()
    if _is_complete(spec, folder):
        return
    try:
        with file_lock(str(folder)):
            if not _is_complete(spec, folder):
                _write_anew(spec, folder)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write the shapes dataset to {folder} ({error.strerror}): name a folder that "
            "can be written and has room, by DETECTRON2_DATASETS or --out",
        ) from error


def _is_complete(spec: ShapesSpec, folder: Path) -> bool:
    """Whether the first line of the JSON names this very set; a folder gets its name when whole."""
    try:
        with open(folder / "instances.json", "rb") as file:
            return file.readline() == _first_line(spec).encode()
    except (FileNotFoundError, NotADirectoryError):
        return False


def _first_line(spec: ShapesSpec) -> str:
    info = {"description": "iou_d2 shapes", "version": VERSION, **asdict(spec)}
    return f'{{"info": {json.dumps(info)},\n'


def _write_anew(spec: ShapesSpec, folder: Path) -> None:
    """Write the set beside `folder` and rename it, so that `folder` never holds half of it."""
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        (unfinished / "images").mkdir(parents=True)
        _write_set(spec, unfinished)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)  # a full disk needs its room back
        raise


def _write_set(spec: ShapesSpec, folder: Path) -> None:
    """Write images and JSON; records go to the file as they come, none are kept."""
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    images = (
        {"id": i + 1, "file_name": _file_name(i), "height": spec.pixels, "width": spec.pixels}
        for i in range(spec.images)
    )
    with open(folder / "instances.json", "w", encoding="utf-8") as file:
        file.write(_first_line(spec))
        file.write(f'"categories": {json.dumps(categories)},\n"images": [\n')
        _write_records(file, images)
        file.write('],\n"annotations": [\n')
        _write_records(file, _make_images(spec, folder / "images"))
        file.write("]}\n")


def _write_records(file, records: Iterable[dict]) -> None:
    for i, record in enumerate(records):
        file.write((",\n" if i else "") + json.dumps(record))
    file.write("\n")


def _make_images(spec: ShapesSpec, folder: Path) -> Iterator[dict]:
    """Write all images into `folder` and yield their annotations in the order of the images."""
    ids = itertools.count(1)  # pycocotools takes 0 for "no match"
    # A third thread only waits for Python's lock.
    with ThreadPoolExecutor(2) as pool, tqdm(total=spec.images, desc=f"shapes {spec.split}") as bar:
        for start in range(0, spec.images, _CHUNK):
            chunk = range(start, min(start + _CHUNK, spec.images))
            for records in pool.map(partial(_make_one, spec, folder), chunk):
                yield from ({"id": next(ids), **record} for record in records)
                bar.update()


def _make_one(spec: ShapesSpec, folder: Path, index: int) -> list[dict]:
    image, annotations = make_image(spec.seed, _SPLITS.index(spec.split), index, spec.pixels)
    _, png = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    # imwrite would only return False on a full disk.
    (folder / _file_name(index)).write_bytes(png)
    return [_coco_record(annotation, index + 1) for annotation in annotations]


def _file_name(index: int) -> str:
    return f"{index + 1:06d}.png"


def _coco_record(annotation: Annotation, image_id: int) -> dict:
    x1, y1, x2, y2 = annotation.box
    rle = mask_util.encode(np.asfortranarray(annotation.mask, dtype=np.uint8))
    return {
        "image_id": image_id,
        "category_id": annotation.label + 1,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(annotation.mask.sum()),
        "iscrowd": int(annotation.crowd),
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
    }
