"""A user's COCO JSON: check it, mend what can be mended, and hand it to Detectron2's own loader.

COCO writes a box as [x, y, width, height] in absolute pixels. Every error names the file and the
record, as `annotations[7] (id 42)`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from .cleaning import (
    CLIPPED,
    NO_TRUST,
    Findings,
    Trust,
    clean_box,
    copy_name,
    require_files,
    write_text,
)

FILLED_IN = {
    "id": "annotations without a positive integer id were given one",
    "area": "annotations without a positive area got that of their box",
    "iscrowd": "annotations without iscrowd got 0",
    "segmentation": "segmentations that are neither polygons nor RLE were left out",
}


def register_coco(
    json_file: Path, image_folder: Path | None, clean_dir: Path, trust: Trust = NO_TRUST
) -> str:
    """Register a COCO JSON with Detectron2 and return its name, `coco:JSON:IMAGE_FOLDER`.

    Args:
        json_file: absolute path of the annotations.
        image_folder: absolute path; None looks in `images/` beside the JSON, then beside it.
        clean_dir: where a mended copy of the annotations goes, if anything had to be mended.
            Training and evaluation both read that copy, so that they see the same boxes.

    Raises:
        FileNotFoundError: the JSON or images that it lists are not there.
        ValueError: the JSON is broken or contradicts itself.
    """
    registered = _registered_name(json_file, image_folder)
    if registered is not None:
        return registered
    data = read_coco(json_file)
    if image_folder is None:
        image_folder = _find_image_folder(json_file, data["images"])
    name = _name(json_file, image_folder)
    if name in DatasetCatalog:
        return name
    images = [str(image_folder / image["file_name"]) for image in data["images"]]
    require_files(json_file, "images", images)
    annotations, findings = clean_annotations(data)
    source = json_file
    if findings:
        source = clean_dir / f"{copy_name(json_file.stem, name)}.json"
        write_text(source, json.dumps({**data, "annotations": annotations}))
        logging.getLogger(__name__).warning(
            f"{json_file}: of {len(data['annotations'])} annotations, {findings}. "
            f"Training and evaluation read the mended copy {source}."
        )
    categories = sorted(data["categories"], key=lambda category: category["id"])
    metadata = {
        "thing_classes": [category["name"] for category in categories],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
    }
    register_coco_instances(name, metadata, str(source), str(image_folder))
    return name


def read_coco(json_file: Path) -> dict[str, Any]:
    """Read and check a COCO JSON. Raises FileNotFoundError or ValueError, see `register_coco`."""
    data = _parse(json_file)
    if not isinstance(data, dict):
        raise ValueError(
            f"{json_file} holds a {type(data).__name__}, not a COCO dict with the keys "
            "images, annotations and categories: is it a file of detections?"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list):
            raise ValueError(f"{json_file} is not a COCO annotation file: it has no list '{key}'.")
    for key in ("images", "categories"):
        if not data[key]:
            raise ValueError(f"{json_file} lists no {key}.")
    image_ids = _unique_ids(json_file, "images", data["images"])
    category_ids = _unique_ids(json_file, "categories", data["categories"])
    _check_images(json_file, data["images"])
    _check_category_names(json_file, data["categories"])
    _check_annotations(json_file, data["annotations"], image_ids, category_ids)
    return data


def clean_annotations(data: dict[str, Any]) -> tuple[list[dict], Findings]:
    """Drop boxes without area or outside their image, clip the others, fill in missing fields.

    Takes checked data and does not change it; untouched annotations are shared, not copied.
    COCOeval needs `area`, `iscrowd` and `id`, and takes id 0 for "no match". Crowd regions stay.
    """
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    ids = [a["id"] for a in data["annotations"] if _is_positive_int(a.get("id"))]
    next_id = max(ids, default=0) + 1
    kept, findings = [], Findings()
    for index, annotation in enumerate(data["annotations"]):
        x, y, w, h = annotation["bbox"]
        box, finding = clean_box((x, y, x + w, y + h), *sizes[annotation["image_id"]])
        if finding is not None:
            findings.add(finding, _where("annotations", index, annotation))
        if box is None:
            continue
        if finding == CLIPPED:
            annotation = _with_box(annotation, box)
        missing = _missing_fields(annotation)
        if missing:
            for key in missing:
                findings.add(FILLED_IN[key], _where("annotations", index, annotation))
            annotation = {**annotation, **missing}
        if "id" in missing:
            annotation["id"] = next_id
            next_id += 1
        kept.append(annotation)
    return kept, findings


def _missing_fields(annotation: dict) -> dict[str, Any]:
    """Values for the fields that are missing or of no use; the caller numbers `id`."""
    fields: dict[str, Any] = {}
    if not _is_positive_int(annotation.get("id")):
        fields["id"] = None
    area = annotation.get("area")
    if not (_is_number(area) and area > 0):
        fields["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    if "iscrowd" not in annotation:
        fields["iscrowd"] = 0
    # Detectron2 would leave out the whole object, which a box detector can do without a mask.
    if not _is_segmentation(annotation.get("segmentation")):
        fields["segmentation"] = []
    return fields


def _with_box(annotation: dict, box: tuple[float, float, float, float]) -> dict:
    x0, y0, x1, y1 = box
    changed = {**annotation, "bbox": [x0, y0, x1 - x0, y1 - y0]}
    if _is_number(annotation.get("area")):
        changed["area"] = min(annotation["area"], (x1 - x0) * (y1 - y0))
    return changed


def _parse(json_file: Path) -> Any:
    if not json_file.is_file():
        raise FileNotFoundError(f"There is no annotation file {json_file}.")
    try:
        return json.loads(json_file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        hint = " Is the file cut short?" if is_cut else ""
        raise ValueError(
            f"{json_file} is not valid JSON: {error.msg} at line {error.lineno}, column "
            f"{error.colno} (character {error.pos} of {len(error.doc)}).{hint}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{json_file} is not UTF-8 text: {error}.") from error


def _name(json_file: Path, image_folder: Path) -> str:
    return f"coco:{json_file}:{image_folder}"


def _registered_name(json_file: Path, image_folder: Path | None) -> str | None:
    """The name under which the file is registered with these images, found without reading it.

    None if it is not registered, or where only its content tells which images it is about.
    """
    folders = _image_folders(json_file) if image_folder is None else [image_folder]
    for folder in folders:
        if _name(json_file, folder) in DatasetCatalog:
            return _name(json_file, folder)
        if folder.is_dir():  # the images may lie here
            return None
    return None


def _image_folders(json_file: Path) -> list[Path]:
    return [json_file.parent / "images", json_file.parent]


def _find_image_folder(json_file: Path, images: Sequence[dict]) -> Path:
    candidates = _image_folders(json_file)
    first = images[0]["file_name"]
    for folder in candidates:
        if (folder / first).is_file():
            return folder
    raise FileNotFoundError(
        f"The first image of {json_file}, {first}, is neither in {candidates[0]} nor in "
        f"{candidates[1]}: name the image folder, as in coco:{json_file}:IMAGE_FOLDER."
    )


def _unique_ids(json_file: Path, kind: str, records: Sequence[Any]) -> set[int]:
    """The ids of `records`; raises where one is not an integer or stands twice."""
    seen: dict[int, int] = {}
    for index, record in enumerate(records):
        if not isinstance(record, dict) or not _is_int(record.get("id")):
            raise ValueError(f"{json_file}: {kind}[{index}] has no integer id.")
        if record["id"] in seen:
            raise ValueError(
                f"{json_file}: {kind}[{seen[record['id']]}] and {kind}[{index}] have the same "
                f"id {record['id']}."
            )
        seen[record["id"]] = index
    return set(seen)


def _check_images(json_file: Path, images: Sequence[dict]) -> None:
    for index, image in enumerate(images):
        where = f"{json_file}: {_where('images', index, image)}"
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise ValueError(f"{where} has no file_name.")
        for key in ("width", "height"):
            if not _is_positive_int(image.get(key)):
                raise ValueError(f"{where} needs a {key} in whole pixels, not {image.get(key)!r}.")


def _check_category_names(json_file: Path, categories: Sequence[dict]) -> None:
    seen: dict[str, str] = {}
    for index, category in enumerate(categories):
        where = _where("categories", index, category)
        name = category.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{json_file}: {where} has no name.")
        if name in seen:
            raise ValueError(f"{json_file}: {seen[name]} and {where} have the same name '{name}'.")
        seen[name] = where


def _check_annotations(
    json_file: Path, annotations: Sequence[Any], image_ids: set[int], category_ids: set[int]
) -> None:
    seen: dict[Any, int] = {}
    for index, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            raise ValueError(f"{json_file}: annotations[{index}] is not a dict.")
        problem = _annotation_problem(annotation, image_ids, category_ids)
        if problem is not None:
            where = _where("annotations", index, annotation)
            raise ValueError(f"{json_file}: {where} {problem}.")
        annotation_id = annotation.get("id")
        if annotation_id is not None and seen.setdefault(annotation_id, index) != index:
            raise ValueError(
                f"{json_file}: annotations[{seen[annotation_id]}] and annotations[{index}] have "
                f"the same id {annotation_id}."
            )


def _annotation_problem(
    annotation: dict, image_ids: set[int], category_ids: set[int]
) -> str | None:
    """Why an annotation cannot be used, as the end of a sentence; None if it can."""
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    if not isinstance(image_id, int) or image_id not in image_ids:
        return f"has image_id {image_id!r}, which is not among the images"
    if not isinstance(category_id, int) or category_id not in category_ids:
        return f"has category_id {category_id!r}, which is not among the categories"
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"needs a bbox of four finite numbers [x, y, width, height], not {box!r}"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f"needs an iscrowd of 0 or 1, not {annotation['iscrowd']!r}"
    if annotation.get("ignore", 0) not in (0, False):
        return "is marked 'ignore', which Detectron2 does not support: use iscrowd = 1"
    if not isinstance(annotation.get("id"), (int, str, type(None))):
        return f"has the id {annotation['id']!r}, which is not an integer"
    return None


def _is_number(value: Any) -> bool:
    # The comparison fails for NaN and infinity, and for integers beyond every float.
    return isinstance(value, (int, float)) and -1e12 < value < 1e12


def _is_int(value: Any) -> bool:
    # No bool, and nothing that NumPy, which COCOeval counts with, cannot hold.
    return type(value) is int and abs(value) < 2**63


def _is_positive_int(value: Any) -> bool:
    return _is_int(value) and value > 0


def _is_segmentation(value: Any) -> bool:
    """Whether Detectron2 can read this segmentation, or takes it for absent."""
    if not value:
        return True
    if isinstance(value, dict):
        return "counts" in value and "size" in value
    if not isinstance(value, list) or not all(isinstance(polygon, list) for polygon in value):
        return False
    return any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in value)


def _where(kind: str, index: int, record: dict) -> str:
    return f"{kind}[{index}] (id {record['id']})" if "id" in record else f"{kind}[{index}]"
