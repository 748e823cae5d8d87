"""`iou-d2 refine`: IoU-guided NMS and refinement of the detections of any detector."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
import tqdm
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from torch import nn

from iou_d2 import get_config
from iou_d2.analysis.reading import read_ground_truth, read_results
from iou_d2.commands.output import check_output_file, write_whole
from iou_d2.commands.parsers.refine import parse_args
from iou_d2.commands.trained import (
    fill,
    names_in,
    read_weights,
    require_same_names,
)
from iou_d2.config import set_class_names
from iou_d2.data.images import usable_header
from iou_d2.data.mapper import CheckedDatasetMapper
from iou_d2.engine.build import build_detector
from iou_d2.engine.config_checks import check_config
from iou_d2.errors import InputError, MissingFileError
from iou_d2.evaluation import coco_precision, summarize_ap
from iou_d2.evaluation.coco import instances_to_results

METRICS = ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90")


def cut_off_warning(results: list[dict]) -> str | None:
    """A sentence where images hold as many detections as Detectron2 leaves by default; None where
    none does, and where one holds more, so that nothing was cut off there."""
    limit = get_cfg().TEST.DETECTIONS_PER_IMAGE
    counts = Counter(result["image_id"] for result in results)
    if not counts or max(counts.values()) != limit:
        return None
    full = sum(count == limit for count in counts.values())
    return (
        f"{full} of {len(counts)} images have exactly {limit} detections, the default of "
        "TEST.DETECTIONS_PER_IMAGE, and none has more: others were cut off, it seems. Make the "
        "results with TEST.DETECTIONS_PER_IMAGE -1."
    )


def setup(
    config_file: str, overrides: list[str], class_names: list[str], trust: bool = False
) -> tuple[CfgNode, dict]:
    """The config of a model of the classes `class_names`, in the order in which the weights have
    them, and the weights.

    Raises InputError: there are no weights, or they are of other classes.
    """
    cfg = get_config(config_file, overrides)
    check_config(cfg)
    content = read_weights(cfg, trust)
    known = names_in(content, cfg.MODEL.WEIGHTS) or list(cfg.MODEL.CLASS_NAMES)
    if known:
        require_same_names(known, class_names, cfg.MODEL.WEIGHTS, "the ground truth")
    set_class_names(cfg, known or class_names)
    cfg.freeze()
    return cfg, content


def load_model(cfg: CfgNode, content: dict) -> nn.Module:
    """The trained model in test mode.

    Raises InputError: it has no IoU branch, or the weights do not fit.
    """
    model = build_detector(cfg).eval()
    if not hasattr(getattr(model, "roi_heads", None), "iou_branch"):
        raise InputError(
            f"A {cfg.MODEL.META_ARCHITECTURE} with MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME} "
            "has no IoU branch to refine with."
        )
    return fill(model, cfg, content)


def classes_of(truth: dict, class_names: Sequence[str]) -> dict:
    """Category ids of the ground truth -> the model's class indices, by name."""
    return {c["id"]: list(class_names).index(c["name"]) for c in truth["categories"]}


def image_records(truth: dict, folder: str, results: list[dict]) -> list[dict]:
    """What the mapper takes of the images that have detections.

    Raises InputError: an image is not there or no image.
    """
    used = {result["image_id"] for result in results}
    records = []
    for image in truth["images"]:
        if image["id"] not in used:
            continue
        path = os.path.join(folder, image["file_name"])
        if not os.path.isfile(path):
            raise MissingFileError(f"There is no image {path}.")
        header = usable_header(path)
        stated = image.get("width", header.width), image.get("height", header.height)
        if stated != (header.width, header.height):
            raise InputError(
                f"{path} is {header.width} x {header.height} pixels, but the ground truth says "
                f"{stated[0]} x {stated[1]}."
            )
        sides = {"height": header.height, "width": header.width}
        records.append({"file_name": path, "image_id": image["id"], **sides})
    return records


def make_candidates(
    detections: list[dict],
    class_of: dict,
    original: tuple[int, int],
    resized: tuple[int, int],
    threshold: float,
) -> Instances:
    """COCO detections of one image with a score over `threshold`, at the size the model sees.

    `original` and `resized` are (height, width); `class_of` maps category ids to class indices.
    """
    detections = [d for d in detections if d["score"] > threshold]
    boxes = torch.tensor([d["bbox"] for d in detections], dtype=torch.float32).view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = Boxes(boxes)
    boxes.scale(resized[1] / original[1], resized[0] / original[0])
    boxes.clip(resized)
    return Instances(
        resized,
        pred_boxes=boxes,
        scores=torch.tensor([float(d["score"]) for d in detections]),
        pred_classes=torch.tensor([class_of[d["category_id"]] for d in detections]).long(),
    )


@torch.no_grad()
def refine_image(
    model: nn.Module, record: dict, detections: list[dict], class_of: dict
) -> list[dict]:
    """COCO detections of one image after NMS and refinement. `record` comes from a mapper."""
    original = record["height"], record["width"]
    images = model.preprocess_image([record])
    heads = model.roi_heads
    candidates = make_candidates(
        detections, class_of, original, images.image_sizes[0], heads.score_threshold
    )
    features = model.backbone(images.tensor)
    refined = heads.detect(features, [candidates.to(model.device)])[0].to("cpu")
    results = instances_to_results(detector_postprocess(refined, *original), record["image_id"])
    category_ids = {index: id_ for id_, index in class_of.items()}
    for result in results:
        result["category_id"] = category_ids[result["category_id"]]
    return results


def refine_results(
    model: nn.Module, cfg: CfgNode, records: list[dict], class_of: dict, results: list[dict]
) -> list[dict]:
    """`results` after NMS and refinement; `records` are those of `image_records`."""
    mapper = CheckedDatasetMapper(cfg, is_train=False)
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    refined = []
    for record in tqdm.tqdm(records, mininterval=1, desc="refining"):
        refined += refine_image(model, mapper(record), by_image[record["image_id"]], class_of)
    return refined


def ap_table(truth: dict, results: list[dict], refined: list[dict]) -> str:
    """AP before and after refinement, in percent over the classes that have objects."""
    rows = []
    for name, detections in (("before", results), ("after", refined)):
        table = summarize_ap(coco_precision(truth, detections), [])
        rows.append([name, *(table[metric] for metric in METRICS)])
    return tabulate(rows, ["", *METRICS], "pipe", floatfmt=".1f")


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    check_output_file(args.output)
    truth = read_ground_truth(args.gt)
    results = read_results(args.results, truth)
    warning = cut_off_warning(results)
    if warning:
        print(warning, file=sys.stderr)
    categories = sorted(truth["categories"], key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    records = image_records(truth, args.images, results)
    cfg, content = setup(args.config_file, args.opts, names, args.trust_weights)
    model = load_model(cfg, content)
    class_of = classes_of(truth, cfg.MODEL.CLASS_NAMES)
    refined = refine_results(model, cfg, records, class_of, results)
    write_whole(args.output, json.dumps(refined))
    if "annotations" in truth:
        print(ap_table(truth, results, refined))
    else:
        print(f"{args.gt} has no annotations: AP is left out.")
    print(f"{len(refined)} of {len(results)} detections are left, in {args.output}.")
