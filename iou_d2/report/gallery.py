"""Which images a page shows, and what is drawn on each.

Boxes are XYWH in pixels of the picture that is shown, not of the image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iou_d2.analysis.errors_of_detections import MISSED
from iou_d2.analysis.matching import box_iou

from .measures import Measures
from .thumbnails import SIDE, Thumbnails

_TRUTHS, _DETECTIONS = 150, 100  # boxes of an image that are drawn


@dataclass(frozen=True)
class ImageFacts:
    """What there is in one image: indices into annotations and detections, and how good it is.

    Attributes:
        quality: panoptic quality of the boxes (Kirillov et al., Panoptic Segmentation, 2019,
            Eqn. 1), over all classes together: the IoUs of the finds over finds and half of all
            false detections and of all objects that are not found; NaN where there is none of them.
        wrong: the best scored detection that is an error, -1 for none.
    """

    image: dict
    truths: list[int]
    detections: list[int]
    quality: float
    wrong: int


def image_facts(measures: Measures) -> list[ImageFacts]:
    """Of all images, counted from the score of `measures` on."""
    truths, detections = defaultdict(list), defaultdict(list)
    for index, annotation in enumerate(measures.truth["annotations"]):
        truths[annotation["image_id"]].append(index)
    for row in np.argsort(-measures.records.score, kind="stable").tolist():
        detections[measures.results[row]["image_id"]].append(row)
    return [
        _facts(measures, image, truths[image["id"]], detections[image["id"]])
        for image in measures.truth["images"]
    ]


def _facts(measures: Measures, image: dict, truths: list[int], rows: list[int]) -> ImageFacts:
    annotations, kind = measures.truth["annotations"], measures.errors.kind
    wrong = next((row for row in rows if kind[row] not in ("found", "ignored")), -1)
    shown = [row for row in rows if is_shown(measures, row)]
    finds = [row for row in shown if kind[row] == "found"]
    false = sum(kind[row] != "ignored" for row in shown) - len(finds)
    objects = sum(not annotations[index].get("iscrowd", 0) for index in truths)
    total = len(finds) + false / 2 + (objects - len(finds)) / 2
    iou = sum(
        box_iou([measures.results[row]], [annotations[measures.errors.found[row]]], [0])[0, 0]
        for row in finds
    )
    return ImageFacts(image, truths, rows, iou / total if total else float("nan"), wrong)


def is_shown(measures: Measures, row: int) -> bool:
    """Whether a detection is above the score of F1; without one all are."""
    return not measures.records.score[row] < measures.score


def choose(facts: Sequence[ImageFacts], measures: Measures, number: int) -> dict[str, list[int]]:
    """The places in `facts` of the best, the worst and the most confidently wrong images.

    Of equally good images those with more objects are the better ones, and the worse ones.
    """
    rated = [place for place, fact in enumerate(facts) if np.isfinite(fact.quality)]
    wrong = [place for place, fact in enumerate(facts) if fact.wrong >= 0]
    return {
        "best": sorted(rated, key=lambda p: (-facts[p].quality, -len(facts[p].truths)))[:number],
        "worst": sorted(rated, key=lambda p: (facts[p].quality, -len(facts[p].truths)))[:number],
        "wrong": sorted(wrong, key=lambda p: -measures.records.score[facts[p].wrong])[:number],
    }


def gallery(
    name: str, measures: Measures, folder: Path | None, thumbnails: Thumbnails, number: int
) -> dict:
    """What the script needs to show up to `number` images a list."""
    facts = image_facts(measures)
    lists = choose(facts, measures, number)
    places = sorted({place for chosen in lists.values() for place in chosen})
    index = {place: n for n, place in enumerate(places)}
    return {
        "name": name,
        "classes": measures.class_names,
        "lists": {key: [index[place] for place in chosen] for key, chosen in lists.items()},
        "images": [_card(facts[place], measures, folder, thumbnails) for place in places],
    }


def _card(
    fact: ImageFacts, measures: Measures, folder: Path | None, thumbnails: Thumbnails
) -> dict:
    image = fact.image
    file = None if folder is None else folder / str(image["file_name"])
    picture, why, size = thumbnails.take(file)
    sides = (image.get("width"), image.get("height"))
    if not all(sides):
        sides = size or _extent(fact, measures)
    scale = SIDE / max(sides)
    lowest = measures.records.score[fact.wrong] if fact.wrong >= 0 else np.inf
    rows = [r for r in fact.detections if is_shown(measures, r) or r == fact.wrong]
    seen = {measures.errors.found[row] for row in rows if measures.errors.found[row] >= 0}
    return {
        "name": str(image["file_name"]),
        "size": [max(1.0, round(side * scale, 1)) for side in sides],
        "picture": picture,
        "why": why,
        "quality": fact.quality,
        "wrong": float(lowest) if np.isfinite(lowest) else None,
        "left_out": max(0, len(fact.truths) - _TRUTHS) + max(0, len(rows) - _DETECTIONS),
        "truths": [_truth(i, measures, scale, seen) for i in fact.truths[:_TRUTHS]],
        "detections": [_detection(row, measures, scale) for row in rows[:_DETECTIONS]],
    }


def _extent(fact: ImageFacts, measures: Measures) -> tuple[float, float]:
    """The sides that hold all boxes, of an image whose own nobody knows."""
    records = [measures.truth["annotations"][i] for i in fact.truths]
    boxes = [r["bbox"] for r in records + [measures.results[row] for row in fact.detections]]
    sides = [max([1.0, *(box[axis] + box[axis + 2] for box in boxes)]) for axis in (0, 1)]
    return sides[0], sides[1]


def _truth(index: int, measures: Measures, scale: float, seen: set) -> list:
    annotation = measures.truth["annotations"][index]
    kind = "found" if index in seen else MISSED
    return [*_record(annotation, measures, scale), "ignored" if annotation.get("iscrowd") else kind]


def _detection(row: int, measures: Measures, scale: float) -> list:
    records = measures.records
    iou = None if records.pred_iou is None else round(float(records.pred_iou[row]), 3)
    values = [round(float(x[row]), 3) for x in (records.score, records.true_iou)]
    record = _record(measures.results[row], measures, scale)
    return [*record, str(measures.errors.kind[row]), *values, iou]


def _record(record: dict, measures: Measures, scale: float) -> list:
    """[x, y, w, h, place of the class]."""
    box = [round(value * scale, 1) for value in record["bbox"]]
    return [*box, measures.class_place[record["category_id"]]]
