"""COCO annotations as Detectron2's records, kept small until they are asked for."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from .json_file import no_garbage_collection
from .packed_list import PackedArray, PackedList

NO_MASK, POLYGONS, RLE = "no mask", "polygons", "RLE"
# As in `load_coco_json`.
_KEYS = ("iscrowd", "bbox", "keypoints", "category_id")


class PackedRecords:
    """The images of a mended COCO dict and their objects, about a fifth as large as Python's dicts.

    Attributes:
        first_by_mask: the kinds of masks that objects have, crowds left out, each with the first
            object of it in words.
    """

    def __init__(self, data: dict[str, Any], image_folder: Path) -> None:
        """`data` are those of a `CocoFile`; if its annotations are packed, none are left there."""
        images = sorted(data["images"], key=lambda image: image["id"])
        index = {image["id"]: i for i, image in enumerate(images)}
        annotations = data.get("annotations", [])
        image_of, category_of, crowds = array("q"), array("q"), array("b")
        self.first_by_mask: dict[str, str] = {}

        def objects() -> Iterator[dict[str, Any]]:
            is_packed = isinstance(annotations, PackedList)
            for annotation in annotations.drain() if is_packed else annotations:
                image_of.append(index[annotation["image_id"]])
                category_of.append(annotation["category_id"])
                crowds.append(annotation["iscrowd"])
                packed = _object(annotation)
                kind = mask_kind(packed)
                if kind not in self.first_by_mask and not annotation["iscrowd"]:
                    file_name = images[image_of[-1]]["file_name"]
                    where = f"annotation {annotation['id']} of the image {file_name}"
                    self.first_by_mask[kind] = where
                yield packed

        with no_garbage_collection():
            self._objects = PackedArray(objects())
            keys = ("file_name", "height", "width", "id")
            self._images = PackedArray(tuple(image[key] for key in keys) for image in images)
        # The objects of image i are `order[starts[i] : starts[i + 1]]`, in the order of the file.
        self._image_of = np.array(image_of)
        self._category_of = np.array(category_of)
        self._is_crowd = np.array(crowds, dtype=bool)
        self._order = np.argsort(self._image_of, kind="stable")
        ordered = self._image_of[self._order]
        self._starts = np.searchsorted(ordered, np.arange(len(images) + 1))
        self._folder = str(image_folder)

    def __len__(self) -> int:
        return len(self._images)

    def record(self, index: int, class_index: dict[int, int]) -> dict[str, Any]:
        """One of what Detectron2's `load_coco_json` gives for the same data.

        Args:
            class_index: the class of each category id; objects of others are left out.
        """
        _, height, width, image_id = self._images[index]
        start, end = self._starts[index : index + 2].tolist()
        objects = map(self._objects.__getitem__, self._order[start:end].tolist())
        record = {
            "file_name": self.file_name(index),
            "height": height,
            "width": width,
            "image_id": image_id,
            "annotations": [o for o in objects if o["category_id"] in class_index],
        }
        for item in record["annotations"]:
            item["category_id"] = class_index[item["category_id"]]
            item["bbox_mode"] = BoxMode.XYWH_ABS
        return record

    def file_name(self, index: int) -> str:
        """The path of an image."""
        return os.path.join(self._folder, self._images[index][0])

    def count_objects(self, class_index: dict[int, int]) -> tuple[np.ndarray, dict[int, int]]:
        """Objects that are no crowds: (N,) those of each image, and those of each class."""
        counted = ~self._is_crowd & np.isin(self._category_of, list(class_index))
        of_image = np.bincount(self._image_of[counted], minlength=len(self))
        ids, counts = np.unique(self._category_of[counted], return_counts=True)
        by_class = {class_index[i]: n for i, n in zip(ids.tolist(), counts.tolist())}
        return of_image, by_class


class LazyRecords(Sequence):
    """The records of a COCO dataset, or some of them, each made when it is looked at."""

    def __init__(
        self,
        packed: PackedRecords,
        class_index: dict[int, int],
        chosen: Sequence[int] | None = None,
    ) -> None:
        """`chosen` are the indices of the records; None takes all."""
        self._packed, self._class_index = packed, class_index
        self._chosen = range(len(packed)) if chosen is None else np.array(chosen, dtype=np.int64)
        self.first_by_mask = packed.first_by_mask

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._packed.record(int(self._chosen[index]), self._class_index)

    def file_names(self) -> Iterator[str]:
        """Those of the records, without making these."""
        return (self._packed.file_name(int(index)) for index in self._chosen)

    def with_objects(self) -> LazyRecords:
        """The records that have an object that is no crowd."""
        of_image, _ = self._packed.count_objects(self._class_index)
        chosen = np.array(self._chosen, dtype=np.int64)
        return LazyRecords(self._packed, self._class_index, chosen[of_image[chosen] > 0])

    def objects_by_class(self) -> dict[int, int]:
        """How many objects of the whole dataset, crowds left out, each class has, if any."""
        return self._packed.count_objects(self._class_index)[1]


def records_of(name: str) -> Sequence[dict[str, Any]]:
    """The records of a registered dataset. Those of a COCO file of a user are `LazyRecords`."""
    metadata = MetadataCatalog.get(name)
    packed = metadata.get("packed_records")
    if packed is None:
        return DatasetCatalog.get(name)
    return LazyRecords(packed, metadata.thing_dataset_id_to_contiguous_id)


def mask_kind(item: dict[str, Any]) -> str:
    """What one of Detectron2's dicts of an object has: NO_MASK, POLYGONS or RLE."""
    mask = item.get("segmentation")
    if not mask:
        return NO_MASK
    return RLE if isinstance(mask, dict) else POLYGONS


def _object(annotation: dict) -> dict[str, Any]:
    packed = {key: annotation[key] for key in _KEYS if key in annotation}
    mask = annotation.get("segmentation")
    if isinstance(mask, dict) and mask:
        is_list = isinstance(mask["counts"], list)
        packed["segmentation"] = mask_util.frPyObjects(mask, *mask["size"]) if is_list else mask
    elif mask:
        packed["segmentation"] = [p for p in mask if len(p) % 2 == 0 and len(p) >= 6]
    points = annotation.get("keypoints")
    if points:
        # Whole numbers name pixels; Detectron2 wants their centres.
        packed["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(points)]
    return packed
