"""One pass of a detector over a test set, and all that the figures are drawn from.

Shape letters: R detections of an image, T steps. "Rows" are COCO detections; those of paths also
hold "boxes", XYXY in pixels of the image after 0, 1, ... T steps, and "pred_ious" of these.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Instances
from torch import nn

from iou_d2.data.mapper import CheckedDatasetMapper
from iou_d2.detectors.dense import rescale_detections
from iou_d2.evaluation import COCOLocalizationEvaluator
from iou_d2.evaluation.coco import instances_to_results

from .candidates import Source, copied
from .variants import suppressors, variants_of


@dataclass(frozen=True)
class Gathered:
    """
    Args:
        truth: the COCO dataset of the images that were looked at.
        variants: name of VARIANTS -> rows of what this NMS leaves.
        steps: name of a refinement -> for 0, 1, ... T steps the rows that the detector would have.
        paths: name of a refinement -> rows of paths.
    """

    truth: dict
    variants: dict[str, list[dict]]
    steps: dict[str, list[list[dict]]]
    paths: dict[str, list[dict]]


@torch.no_grad()
def gather(
    cfg: CfgNode,
    dataset: str,
    detector: nn.Module,
    source: Source,
    output: str | os.PathLike,
    count: int | None = None,
) -> Gathered:
    """What `source` says of the first `count` images of a registered dataset; None for all.

    `output` gets the COCO JSON of a dataset that has none.
    """
    evaluator = COCOLocalizationEvaluator(dataset, os.fspath(output), distributed=False)
    node = cfg.MODEL.ROI_HEADS if isinstance(detector, GeneralizedRCNN) else cfg.MODEL.RETINANET
    kinds = suppressors(node.NMS_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE)
    loader = build_detection_test_loader(
        cfg, dataset, mapper=CheckedDatasetMapper(cfg, is_train=False)
    )
    seen: list = []
    variants: dict[str, list[dict]] = {}
    steps: dict[str, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    paths: dict[str, list[dict]] = defaultdict(list)
    for (image,) in islice(loader, count):  # test loaders have one image a batch
        seen.append(image["image_id"])
        found = source(image)
        for name, kept in variants_of(found.candidates, kinds).items():
            variants.setdefault(name, []).extend(rows_of(kept, image))
        for name, path in found.paths.items():
            paths[name] += path_rows(path, image)
            for step, detections in enumerate(path):
                steps[name][step] += rows_of(source.finish(detections), image)
    return Gathered(
        truth=only_images(evaluator.truth(), seen),
        variants={name: evaluator.with_category_ids(x) for name, x in variants.items()},
        steps={
            name: [evaluator.with_category_ids(x) for x in by_step.values()]
            for name, by_step in steps.items()
        },
        paths={name: evaluator.with_category_ids(x) for name, x in paths.items()},
    )


def rows_of(detections: Instances, image: dict) -> list[dict]:
    """Rows of detections at the size of the network input, by class index."""
    # A copy, since Detectron2's postprocessing moves the boxes in place.
    (output,) = rescale_detections([copied(detections)], [image])
    return instances_to_results(output["instances"].to("cpu"), image["image_id"])


def path_rows(path: list[Instances], image: dict) -> list[dict]:
    """Rows of paths, by class index, from T + 1 times the same R detections."""
    height, width = path[0].image_size
    scale = (image.get("width", width) / width, image.get("height", height) / height)
    scale = path[0].pred_boxes.tensor.new_tensor(scale).repeat(2)
    boxes = torch.stack([x.pred_boxes.tensor for x in path], dim=1) * scale  # (R, T + 1, 4)
    ious = torch.stack([x.pred_ious for x in path], dim=1).clamp(0, 1)
    rows = zip(
        boxes.tolist(), ious.tolist(), path[0].scores.tolist(), path[0].pred_classes.tolist()
    )
    return [
        {
            "image_id": image["image_id"],
            "category_id": label,
            "score": score,
            "bbox": [*at[0][:2], at[0][2] - at[0][0], at[0][3] - at[0][1]],
            "boxes": at,
            "pred_ious": predicted,
        }
        for at, predicted, score, label in rows
    ]


def only_images(truth: dict, ids: list) -> dict:
    """A COCO dataset without the images that are not in `ids`, and their objects."""
    wanted = set(ids)
    return {
        **truth,
        "images": [image for image in truth["images"] if image["id"] in wanted],
        "annotations": [x for x in truth["annotations"] if x["image_id"] in wanted],
    }
