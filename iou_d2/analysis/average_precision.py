"""Average precision as COCO defines it, from plain COCO dicts. Knows no Detectron2.

Shapes: T = 10 IoU thresholds, R = 101 recall levels, K classes in order of their category id,
A = 4 ranges of object area (all, small, medium, large).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterable

import numpy as np
from pycocotools import mask as mask_util

from iou_d2.analysis.records import check_ids

IOU_THRESHOLDS = np.arange(50, 100, 5) / 100
_AREAS = {"all": 0, "small": 1, "medium": 2, "large": 3}


def coco_precision(ground_truth: dict, results: list[dict], **arguments) -> np.ndarray:
    """Interpolated precision, the array that every AP of COCO is a mean of: (T, R, K, A), the first
    of `coco_precision_recall`, which takes the same arguments."""
    return coco_precision_recall(ground_truth, results, **arguments)[0]


def coco_precision_recall(
    ground_truth: dict,
    results: list[dict],
    *,
    image_ids: Iterable | None = None,
    max_dets: int = 100,
    backend: str | None = None,
    kind: str = "bbox",
) -> tuple[np.ndarray, np.ndarray]:
    """Interpolated precision, and the recall that is reached in the end, as COCO counts.

    Both back ends agree to 1e-6 (a test): "pycocotools", the official one, and "faster", the
    package faster-coco-eval, which counts in C++. Ids may be of any kind: they are renumbered from
    1, since pycocotools takes an annotation with id 0 for no annotation and the faster one wants
    integers.

    Args:
        ground_truth: COCO dataset: "images", "categories", "annotations". An annotation without
            "iscrowd" is no crowd; without "area" its area is that of its box.
        results: COCO detections. May be empty: the precision of every class with objects is then 0.
            An "area" in them is not read.
        image_ids: images to count on; None for all.
        max_dets: detections of an image and class that count, best first.
        backend: "pycocotools", "faster", or None for the faster one where it is installed.
        kind: of the IoU, "bbox" or "segm", that of masks: images have "height" and "width",
            annotations and detections a "segmentation", polygons or RLE. The area of a detection is
            then that of its mask, and so is that of an annotation without "area".

    Returns:
        precision: (T, R, K, A) float64 in [0, 1]; -1 for a class and area range without objects.
        recall: (T, K, A), the same of the share of the objects that are found at any score.

    Raises:
        ValueError: unknown back end, a detection of an unknown image or category, or no mask where
            masks count.
        ImportError: the back end asked for is not installed.
    """
    coco_class, eval_class = _backend(backend)
    check_ids(ground_truth, results)
    index = _with_masks if kind == "segm" else _with_boxes
    number = {id_: n for n, id_ in enumerate(sorted(i["id"] for i in ground_truth["images"]), 1)}

    # Both packages print their progress.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = index(coco_class, ground_truth, ground_truth["annotations"], number)
        measured = [{k: v for k, v in result.items() if k != "area"} for result in results]
        detections = index(coco_class, ground_truth, measured, number)
        evaluation = eval_class(truth, detections, kind)
        evaluation.params.maxDets = [max_dets]
        if image_ids is not None:
            evaluation.params.imgIds = [number[id_] for id_ in image_ids]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][..., 0], evaluation.eval["recall"][..., 0]


def _backend(name: str | None) -> tuple[type, type]:
    """The classes COCO and COCOeval of a back end."""
    if name not in (None, "pycocotools", "faster"):
        raise ValueError(f'The back end should be "pycocotools" or "faster", but is {name!r}.')
    if name is None:
        name = "faster" if importlib.util.find_spec("faster_coco_eval") else "pycocotools"
    logging.getLogger(__name__).info(f"Counting AP with {name}.")
    if name == "faster":
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def _with_boxes(coco_class: type, dataset: dict, boxes: list[dict], number: dict):
    """A COCO object of `boxes`, annotations or detections, with images numbered by `number`."""
    images = [{"id": n} for n in number.values()]
    annotations = [
        {
            **_label(n, box, number),
            "bbox": box["bbox"],
            "area": box.get("area", box["bbox"][2] * box["bbox"][3]),
        }
        for n, box in enumerate(boxes, 1)
    ]
    return _index(coco_class, images, dataset["categories"], annotations)


def _with_masks(coco_class: type, dataset: dict, masks: list[dict], number: dict):
    """The same of masks."""
    sizes = {number[i["id"]]: (i["height"], i["width"]) for i in dataset["images"]}
    images = [{"id": n, "height": size[0], "width": size[1]} for n, size in sizes.items()]
    annotations = []
    for n, mask in enumerate(masks, 1):
        label = _label(n, mask, number)
        rle = as_rle(mask.get("segmentation"), *sizes[label["image_id"]])
        area = mask.get("area", float(mask_util.area(rle)))
        annotations.append({**label, "segmentation": rle, "area": area})
    return _index(coco_class, images, dataset["categories"], annotations)


def as_rle(segmentation: list | dict | None, height: int, width: int) -> dict:
    """The compressed RLE of polygons, those of less than three points left out, or of a COCO RLE.

    Raises a ValueError where `has_mask` is False.
    """
    if not has_mask(segmentation):
        raise ValueError("An annotation or detection has no mask.")
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if _is_area(polygon)]
        return mask_util.merge(mask_util.frPyObjects(polygons, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation


def has_mask(segmentation: list | dict | None) -> bool:
    """Whether a "segmentation" of COCO is an RLE, or has a polygon of three points or more."""
    is_list = isinstance(segmentation, list)
    return any(map(_is_area, segmentation)) if is_list else bool(segmentation)


def _is_area(polygon: list) -> bool:
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def _label(n: int, box: dict, number: dict) -> dict:
    return {
        "id": n,
        "image_id": number[box["image_id"]],
        "category_id": box["category_id"],
        "iscrowd": box.get("iscrowd", 0),
        "score": box.get("score", 0),
    }


def _index(coco_class: type, images: list, categories: list, annotations: list):
    coco = coco_class()
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    coco.createIndex()
    return coco


def summarize_ap(precision: np.ndarray, class_names: list[str]) -> dict[str, float]:
    """The AP table of the localisation papers, in percent.

    Args:
        precision: (T, R, K, A) of `coco_precision`.
        class_names: K names in order of the category ids.

    Returns:
        AP, AP50, AP60, AP70, AP75, AP80, AP90; APs, APm, APl by area; AP-<class>. NaN where there
        are no objects to find.
    """
    by_iou = ap_by_iou(precision)
    table = {"AP": _mean(precision[..., _AREAS["all"]])}
    for percent in (50, 60, 70, 75, 80, 90):
        table[f"AP{percent}"] = float(by_iou[(percent - 50) // 5])
    for area in ("small", "medium", "large"):
        table[f"AP{area[0]}"] = _mean(precision[..., _AREAS[area]])
    for k, name in enumerate(class_names):
        table[f"AP-{name}"] = _mean(precision[:, :, k, _AREAS["all"]])
    return table


def ap_by_iou(values: np.ndarray) -> np.ndarray:
    """AP in percent at each of `IOU_THRESHOLDS`, (T,), from precision (T, R, K, A); the same of a
    recall (T, K, A). NaN where there are no objects at all."""
    return np.array([_mean(at_threshold[..., _AREAS["all"]]) for at_threshold in values])


def precision_by_recall(precision: np.ndarray, min_iou: float) -> np.ndarray:
    """(R,) mean over classes of precision (T, R, K, A) in percent at one of `IOU_THRESHOLDS`."""
    at = int(np.argmin(np.abs(IOU_THRESHOLDS - min_iou)))
    return np.array([_mean(level[:, _AREAS["all"]]) for level in precision[at]])


def _mean(precision: np.ndarray) -> float:
    defined = precision[precision > -1]
    return 100 * float(defined.mean()) if defined.size else float("nan")
