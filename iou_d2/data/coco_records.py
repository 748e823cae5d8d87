"""COCO annotations as Detectron2's records, kept small until they are asked for."""

from __future__ import annotations

import marshal
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

# As in `load_coco_json`, in its order.
_KEYS = ("iscrowd", "bbox", "keypoints", "category_id")


class PackedRecords:
    """The records of a mended COCO dict, about a fifth as large as the dicts that they become."""

    def __init__(self, data: dict[str, Any], image_folder: Path) -> None:
        by_image = defaultdict(list)
        for annotation in data.get("annotations", ()):
            by_image[annotation["image_id"]].append(annotation)
        self._images = []
        for image in sorted(data["images"], key=lambda image: image["id"]):
            objects = [_object(annotation) for annotation in by_image.pop(image["id"], ())]
            path = os.path.join(image_folder, image["file_name"])
            header = (path, image["height"], image["width"], image["id"])
            self._images.append((*header, marshal.dumps(objects)))

    def unpack(self, class_index: dict[int, int]) -> list[dict[str, Any]]:
        """What Detectron2's `load_coco_json` gives for the same data.

        Args:
            class_index: the class of each category id; objects of others are left out.
        """
        records = []
        for file_name, height, width, image_id, packed in self._images:
            objects = marshal.loads(packed)
            record = {
                "file_name": file_name,
                "height": height,
                "width": width,
                "image_id": image_id,
                "annotations": [o for o in objects if o["category_id"] in class_index],
            }
            for item in record["annotations"]:
                item["category_id"] = class_index[item["category_id"]]
                item["bbox_mode"] = BoxMode.XYWH_ABS
            records.append(record)
        return records


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
