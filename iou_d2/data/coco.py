"""A user's COCO JSON as a dataset of Detectron2.

COCO writes a box as [x, y, width, height] in absolute pixels. What is mended, and what is refused,
stands in coco_mending.py, coco_annotations.py, coco_images.py and coco_boxes.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from .cleaning import NO_TRUST, Trust, copy_name, write_parts
from .coco_images import find_image_folder
from .coco_reading import CocoFile, read_coco
from .coco_records import PackedRecords, records_of
from .json_file import no_garbage_collection
from .packed_list import PackedList


def register_coco(
    json_file: Path, image_folder: Path | None, clean_dir: Path, trust: Trust = NO_TRUST
) -> str:
    """Register a COCO JSON with Detectron2 and return its name, `coco:JSON:IMAGE_FOLDER`.

    Its metadata has, beside what Detectron2 sets: `findings`, what was mended, and
    `has_annotations`, False for a test set that gives none, on which no AP is measured.

    Args:
        json_file: absolute path of the annotations.
        image_folder: absolute path; None looks where COCO, CVAT and Roboflow put the images.
        clean_dir: where a mended copy of the annotations goes, if anything had to be mended.
            Training and evaluation both read that copy, so that they see the same boxes.
        trust: what is taken as it is written though it looks wrong.

    Raises:
        MissingFileError: the JSON or images that it lists are not there.
        InputError: the JSON is broken, contradicts itself, or its boxes are no XYWH in pixels.
    """
    registered = _registered_name(json_file, image_folder)
    if registered is not None:
        return registered
    coco = read_coco(json_file, image_folder, trust)
    name = _name(json_file, coco.image_folder)
    if name in DatasetCatalog:
        return name
    source = json_file
    if coco.findings:
        source = clean_dir / f"{copy_name(json_file.stem, name)}.json"
        write_parts(source, _json_parts(coco.data))
        logging.getLogger(__name__).warning(
            f"{json_file}: of {len(coco.data['images'])} images, {coco.findings}. "
            f"Training and evaluation read the mended copy {source}."
        )
    if not coco.has_annotations:
        logging.getLogger(__name__).warning(
            f"{json_file} has no 'annotations': detections are written, but no AP is measured."
        )
    _register(name, coco, source)
    return name


def _register(name: str, coco: CocoFile, source: Path) -> None:
    categories = sorted(coco.data["categories"], key=lambda category: category["id"])
    # What was read for the checks is kept, so that no load reads the file again.
    packed = PackedRecords(coco.data, coco.image_folder)
    MetadataCatalog.get(name).set(
        json_file=str(source),
        image_root=str(coco.image_folder),
        evaluator_type="coco",
        findings=coco.findings,
        has_annotations=coco.has_annotations,
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(categories)},
        packed_records=packed,
        first_image=coco.data["images"][0]["file_name"],
    )

    def load() -> list[dict[str, Any]]:
        with no_garbage_collection():
            return list(records_of(name))

    DatasetCatalog.register(name, load)


def _json_parts(data: dict[str, Any], step: int = 10000) -> Iterator[str]:
    """The text of a COCO dict in parts, so that it never stands in memory as a whole."""
    opening = "{"
    for key, value in data.items():
        yield f"{opening}{json.dumps(key)}: "
        opening = ", "
        if not isinstance(value, (list, PackedList)):
            yield json.dumps(value)
            continue
        yield "["
        values, comma = iter(value), ""
        while part := list(islice(values, step)):
            yield comma + json.dumps(part)[1:-1]
            comma = ", "
        yield "]"
    yield "}"


def _name(json_file: Path, image_folder: Path) -> str:
    return f"coco:{json_file}:{image_folder}"


def _registered_name(json_file: Path, image_folder: Path | None) -> str | None:
    """The name under which the file is registered with these images, found without reading it.

    Where no folder is named, it is the one that has the first image now.
    """
    folders = [image_folder]
    if image_folder is None:
        registered = [n for n in DatasetCatalog.list() if n.startswith(f"coco:{json_file}:")]
        first_images = {MetadataCatalog.get(name).first_image for name in registered}
        folders = [find_image_folder(json_file, [{"file_name": n}]) for n in first_images]
    names = [_name(json_file, folder) for folder in folders if folder is not None]
    return next((name for name in names if name in DatasetCatalog), None)
