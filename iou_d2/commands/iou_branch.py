"""`iou-d2 iou-branch`: how well an IoU-Net predicts IoUs, and what their gradient does to boxes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances, pairwise_iou
from tabulate import tabulate
from torch import Tensor

from iou_d2.commands.finished_runs import trained_config
from iou_d2.commands.parsers.iou_branch import parse_args
from iou_d2.commands.run_data import use_test_set
from iou_d2.commands.trained import load_trained
from iou_d2.data.mapper import truth_mapper
from iou_d2.detectors.iou_net_inference import GradientAscent, Postprocessor
from iou_d2.detectors.iou_net_nms import PlainNMS
from iou_d2.errors import InputError
from iou_d2.ops.boxes import aligned_iou
from iou_d2.ops.jitter import jittered_boxes

MIN_SCORE, MIN_IOU = 0.3, 0.5


def read_images(cfg: CfgNode, count: int, clean_dir: Path):
    """The first images of DATASETS.TEST at their test size, with their ground truth."""
    name = use_test_set(cfg, clean_dir)
    mapper = truth_mapper(cfg)
    for record in DatasetCatalog.get(name)[:count]:
        image = mapper(record)
        if image is not None and len(image["instances"]):
            yield image


def on_jittered(branch, features: list[Tensor], truth: Instances) -> Tensor:
    """Predicted and true IoU (R, 2) of up to 200 jittered boxes of an image."""
    boxes, index, ious = jittered_boxes(
        truth.gt_boxes.tensor, truth.image_size, branch.offsets, per_gt=20, per_image=200
    )
    return torch.stack([branch.predict(features, [Boxes(boxes)], truth.gt_classes[index]), ious], 1)


def on_detected(
    heads, maps: dict[str, Tensor], proposals: list[Instances], truth: Instances
) -> Tensor:
    """Predicted and true IoU, and the true IoU after refinement, (R, 3) of an image's boxes."""
    branch, levels = heads.iou_branch, heads.levels(maps)
    plain = Postprocessor(PlainNMS(heads.postprocessor.nms.threshold))
    (found,) = plain(heads.candidates(maps, proposals), branch, levels)
    same_class = found.pred_classes[:, None] == truth.gt_classes
    ious = pairwise_iou(found.pred_boxes, truth.gt_boxes) * same_class
    iou, object_ = ious.max(dim=1)
    keep = (iou > MIN_IOU) & (found.scores > MIN_SCORE)
    found, matched = found[keep], truth.gt_boxes.tensor[object_[keep]]
    before = [found.pred_ious, iou[keep]]
    if len(found):
        heads.postprocessor.refiner([found], branch, levels)
    return torch.stack([*before, aligned_iou(found.pred_boxes.tensor, matched)], dim=1)


@torch.no_grad()
def measure(model, images) -> tuple[Tensor, Tensor]:
    """`on_jittered` and `on_detected` of all images, one after another.

    Raises InputError where the model does not refine by ascent, and where no image has objects."""
    heads = getattr(model, "roi_heads", None)
    if not hasattr(heads, "iou_branch"):
        raise InputError("The model has no IoU branch to measure.")
    if not isinstance(heads.postprocessor.refiner, GradientAscent):
        raise InputError("The model does not refine its boxes by ascent on the predicted IoU.")
    jittered, detected = [], []
    torch.manual_seed(0)
    for image in images:
        batch = model.preprocess_image([image])
        maps = model.backbone(batch.tensor)
        proposals, _ = model.proposal_generator(batch, maps, None)
        truth = image["instances"].to(model.device)
        features = heads.levels(maps)
        jittered.append(on_jittered(heads.iou_branch, features, truth))
        detected.append(on_detected(heads, maps, proposals, truth))
    if not jittered:
        raise InputError("None of the images has an object to measure on.")
    return torch.cat(jittered).cpu(), torch.cat(detected).cpu()


def report(jittered: Tensor, detected: Tensor) -> str:
    rows = []
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        row = [f"{low:.1f} - {low + 0.1:.1f}"]
        for values in (jittered, detected):
            chosen = values[(values[:, 1] >= low) & (values[:, 1] < low + 0.1), 0]
            spread = f"{chosen.mean():.3f} +- {chosen.std():.3f}" if len(chosen) > 1 else "-"
            row += [len(chosen), spread]
        rows.append(row)
    table = tabulate(rows, ["true IoU", "jittered", "predicted", "detected", "predicted"], "pipe")
    lines = [table, ""]
    for name, values in (("jittered", jittered), ("detected", detected)):
        if len(values) < 2:
            lines.append(f"{name}: {len(values)} boxes, too few to tell")
            continue
        error = (values[:, 0] - values[:, 1]).square().mean().sqrt()
        correlation = torch.corrcoef(values[:, :2].t())[0, 1]
        lines.append(f"{name}: Pearson's r {correlation:.3f}, root mean square error {error:.3f}")
    if not len(detected):
        return "\n".join(lines)
    before, after = detected[:, 1], detected[:, 2]
    lines.append(
        f"refinement: mean IoU {before.mean():.3f} -> {after.mean():.3f}, share over 0.9 "
        f"{(before > 0.9).float().mean():.3f} -> {(after > 0.9).float().mean():.3f}"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    cfg = trained_config(args.run)
    model = load_trained(cfg, args.trust_weights)
    print(report(*measure(model, read_images(cfg, args.images, args.run / "datasets"))))
