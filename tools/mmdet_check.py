"""Compare detectors of mmdetection with ours that got their weights from `iou-d2 convert`.

    PYTHONPATH=../mmdet:benchmarks python tools/mmdet_check.py [CONFIG ...]

mmdetection 3.3 has to be installed as the first lines of benchmarks/peers.py say. A model is built
of mmdetection's config with random weights and written to a file with that config; the file is
converted with our config of the published weights, and back. Prints one row of a table for each:
detections of an image that both have, those that one alone has, the largest differences of their
boxes in pixels and of their scores (1 where a pixel of their masks differs), and the largest
relative difference of a loss of two images.
Ends with status 1 where they do not agree, a tensor has no counterpart, or one comes back changed.

R-CNNs take all anchors and proposals, which they draw at random otherwise. Of a cascade the losses
of the first stage are compared; the later ones get other proposals, see docs/WEIGHTS.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn

from adapters import build_mmdet, mmdet_batch, mmdet_config
from iou_d2 import get_config
from iou_d2.commands.convert import main as convert
from iou_d2.engine.export.agreement import Agreement, agreement, arrays_of
from peers import missing

SIZE = (296, 392)  # height, width; no multiples of 32, so that both pad
ALL = 1_000_000  # anchors or proposals of an image
TAKE_ALL = (
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", str(ALL)),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", str(ALL)),
)
THRESHOLD = 0.05  # of scores
FEWEST = 20  # detections that make a comparison
# What the converter prints where something has no counterpart.
COMPLAINTS = ("Left over", "not filled", "Not in the model", "needs", "p6 and p7", "Pixel", "INPUT")
# Of weights by a part of their name: how large outputs are for inputs around 1. The rest has 1.7,
# which keeps the size behind a ReLU, where the weights of an output sum up to 0.
GAINS = {
    r"conv_offset": 0.3,
    r"lateral_convs|fpn_convs": 0.8,
    r"features|extra_layers": 1.3,
    r"cls_convs\.\d\.0": 1.0,
    r"reg_convs\.\d\.0": 0.3,
    r"retina_cls": 1.0,
    r"_cls\.": 2.0,
    r"_reg": 0.3,
}
PIXELS = 75.0  # their standard deviation
# Of classes, so that scores of most points are low.
SIGMOID_BIAS = re.compile(r"bbox_head\.\w+_cls\.bias")


class Case(NamedTuple):
    """Our config, mmdetection's, and its names of losses -> ours."""

    ours: str
    theirs: str
    losses: dict[str, str]


VFNET = {"loss_cls": "loss_cls", "loss_bbox": "loss_box_initial", "loss_bbox_rf": "loss_box"}
POINTS = {"loss_cls": "loss_cls", "loss_bbox": "loss_box", "loss_centerness": "loss_quality"}
RPN = {"loss_rpn_cls": "loss_rpn_cls", "loss_rpn_bbox": "loss_rpn_loc"}
RCNN = {**RPN, "loss_cls": "loss_cls", "loss_bbox": "loss_box_reg"}
CASCADE = {**RPN, "s0.loss_cls": "loss_cls_stage0", "s0.loss_bbox": "loss_box_reg_stage0"}
MASK_RCNN = {**RCNN, "loss_mask": "loss_mask"}
RETINANET = {"loss_cls": "loss_cls", "loss_bbox": "loss_box_reg"}
SSD = {"loss_cls": "loss_cls", "loss_bbox": "loss_box"}
IMPROVED = "gn-head-center-normbbox-centeronreg-giou_1x_coco.py"
CASES = (
    Case("vfnet_R_50_FPN_1x", "vfnet/vfnet_r50_fpn_1x_coco.py", VFNET),
    Case("vfnet_R_50_FPN_dcn_2x_ms", "vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco.py", VFNET),
    Case("mmdet/atss_R_50_FPN", "atss/atss_r50_fpn_1x_coco.py", POINTS),
    Case("mmdet/fcos_R_50_FPN_caffe", "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", POINTS),
    Case("mmdet/fcos_improved_R_50_FPN_caffe", f"fcos/fcos_r50-caffe_fpn_{IMPROVED}", POINTS),
    Case(
        "mmdet/fcos_improved_R_50_FPN_caffe_dcn", f"fcos/fcos_r50-dcn-caffe_fpn_{IMPROVED}", POINTS
    ),
    Case("mmdet/retinanet_R_50_FPN", "retinanet/retinanet_r50_fpn_1x_coco.py", RETINANET),
    Case(
        "mmdet/retinanet_R_50_FPN_caffe", "retinanet/retinanet_r50-caffe_fpn_1x_coco.py", RETINANET
    ),
    Case("mmdet/faster_rcnn_R_50_FPN", "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", RCNN),
    Case("mmdet/mask_rcnn_R_50_FPN", "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", MASK_RCNN),
    Case("mmdet/cascade_rcnn_R_50_FPN", "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py", CASCADE),
    Case(
        "mmdet/cascade_mask_rcnn_R_50_FPN",
        "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
        CASCADE,
    ),
    Case(
        "mmdet/faster_rcnn_R_50_FPN_caffe", "faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco.py", RCNN
    ),
    Case("mmdet/atss_R_101_FPN", "atss/atss_r101_fpn_1x_coco.py", POINTS),
    Case("mmdet/retinanet_R_18_FPN", "retinanet/retinanet_r18_fpn_1x_coco.py", RETINANET),
    Case(
        "mmdet/retinanet_X_101_32x4d_FPN",
        "retinanet/retinanet_x101-32x4d_fpn_1x_coco.py",
        RETINANET,
    ),
    Case(
        "mmdet/fcos_X_101_64x4d_FPN_2x_ms",
        "fcos/fcos_x101-64x4d_fpn_gn-head_ms-640-800-2x_coco.py",
        POINTS,
    ),
    Case(
        "vfnet_X_101_64x4d_FPN_dcn_2x_ms",
        "vfnet/vfnet_x101-64x4d-mdconv-c3-c5_fpn_ms-2x_coco.py",
        VFNET,
    ),
    Case("mmdet/ssd300_VGG16", "ssd/ssd300_coco.py", SSD),
    Case("mmdet/ssd512_VGG16", "ssd/ssd512_coco.py", SSD),
)


class Comparison(NamedTuple):
    """Of a model and its conversion."""

    found: Agreement
    losses: dict[str, float]  # their name -> relative difference
    complaints: list[str]

    def holds(self) -> bool:
        is_close = all(difference <= 1e-4 for difference in self.losses.values())
        enough = self.found.pairs >= FEWEST
        return self.found.holds() and enough and is_close and not self.complaints

    def row(self, name: str) -> list[str]:
        found = self.found
        worst = max(self.losses, key=self.losses.get)
        return [
            *(name, str(found.pairs), f"{found.missing} + {found.extra}"),
            *(f"{found.boxes:.0e}", f"{found.scores:.0e}"),
            f"{self.losses[worst]:.0e} ({worst})",
        ]


HEADERS = ("config", "detections", "missing + more", "boxes, px", "scores, masks", "losses")


def randomize(model: nn.Module) -> None:
    """Every parameter and statistic at random, so that none can be taken for another."""
    pixel_std = model.data_preprocessor.std.float().mean()
    for name, x in model.state_dict().items():
        noise = torch.randn(x.shape)
        if x.ndim > 1:
            gain = next((gain for part, gain in GAINS.items() if re.search(part, name)), 1.7)
            if x.shape[1] == 3:
                gain *= pixel_std / PIXELS
            noise -= noise.mean(dim=tuple(range(1, x.ndim)), keepdim=True)
            x.copy_(gain * noise / x[0].numel() ** 0.5)
        elif name.endswith(("running_var", ".weight", ".scale")):
            x.mul_((1 + 0.1 * noise) * (0.3 if "bn3.weight" in name else 1))
        elif x.is_floating_point():
            x.copy_(0.1 * noise - (4 if SIGMOID_BIAS.match(name) else 0))


def random_batch(size: tuple[int, int], images: int, order: str) -> tuple[list[dict], list[dict]]:
    """The same images with objects in BGR, which mmdetection takes, and in `order`."""
    theirs, ours = [], []
    height, width = size
    for _ in range(images):
        truth = Instances(size)
        truth.gt_boxes = Boxes(objects() * torch.tensor([width, height, width, height]))
        truth.gt_classes = torch.randint(80, (len(truth.gt_boxes),))
        truth.gt_masks = ellipses(truth.gt_boxes, size)
        entry = {"instances": truth, "height": height, "width": width}
        image = torch.randint(256, (3, *size), dtype=torch.uint8)
        theirs.append({**entry, "image": image})
        ours.append({**entry, "image": image if order == "BGR" else image.flip(0)})
    return theirs, ours


def objects() -> Tensor:
    """Four boxes (4, 4) in the unit square that do not overlap, one in each part of it."""
    x, y = (0.3 + 0.4 * torch.rand(2)).tolist()
    parts = torch.tensor([[0, 0, x, y], [x, 0, 1, y], [0, y, x, 1], [x, y, 1, 1]])
    sides = (parts[:, 2:] - parts[:, :2]).repeat(1, 2)
    margins = torch.tensor([1, 1, -1, -1]) * 0.2 * torch.rand(4, 4)
    return parts + margins * sides


def ellipses(boxes: Boxes, size: tuple[int, int]) -> BitMasks:
    """One in each box, as masks of an image of `size`."""
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in size), indexing="ij")
    (cx, cy), (w, h) = boxes.get_centers().T, (boxes.tensor[:, 2:] - boxes.tensor[:, :2]).T
    cx, cy, w, h = (value[:, None, None] for value in (cx, cy, w, h))
    return BitMasks(((x - cx) / w) ** 2 + ((y - cy) / h) ** 2 < 0.25)


def converted(case: Case, cfg: CfgNode, their_cfg: Any, model: nn.Module) -> tuple[nn.Module, list]:
    """Our model with the weights of `model`, and what was wrong on the way there and back."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours, back = (str(Path(folder) / f"{name}.pth") for name in ("a", "b", "c"))
        state = model.state_dict()
        torch.save({"state_dict": state, "meta": {"cfg": their_cfg.pretty_text}}, theirs)
        printed = io.StringIO()
        config = ["--config-file", case.ours]
        with contextlib.redirect_stdout(printed):
            convert([theirs, ours, "--from", "mmdet", "--to", "detectron2", *config])
            convert([ours, back, "--from", "detectron2", "--to", "mmdet", *config])
        lines = printed.getvalue().splitlines()
        complaints = [x for x in lines if any(word in x for word in COMPLAINTS)]
        returned = torch.load(back, weights_only=True)["state_dict"]
        complaints += [
            f"{name} came back changed."
            for name in state.keys() | returned.keys()
            if not (name in state and name in returned and state[name].equal(returned[name]))
        ]
        our_model = build_model(cfg)
        DetectionCheckpointer(our_model).load(ours)
    return our_model, complaints


@torch.no_grad()
def losses_of_mmdet(model: nn.Module, batch: list[dict]) -> dict[str, float]:
    data = model.train().data_preprocessor(mmdet_batch(batch, "cpu"), True)
    losses = model(**data, mode="loss")
    return {name: float(sum(x) if isinstance(x, list) else x) for name, x in losses.items()}


@torch.no_grad()
def our_losses(model: nn.Module, batch: list[dict]) -> dict[str, float]:
    """Those of an RPN divided as mmdetection does, by the anchors that there were."""
    with EventStorage() as storage:
        losses = {name: x.item() for name, x in model.train()(batch).items()}
        latest = {name: value for name, (value, _) in storage.latest().items()}
    anchors = sum(latest.get(f"rpn/num_{kind}_anchors", 0) for kind in ("pos", "neg"))
    return {
        name: x * ALL / anchors if name.startswith("loss_rpn") else x for name, x in losses.items()
    }


@torch.no_grad()
def detections_of_mmdet(model: nn.Module, batch: list[dict]) -> dict:
    data = model.eval().data_preprocessor(mmdet_batch(batch, "cpu"), False)
    found = model(**data, mode="predict")[0].pred_instances
    fields = {"boxes": found.bboxes, "scores": found.scores, "classes": found.labels}
    if "masks" in found:
        fields["masks"] = found.masks.float()
    return {name: x.numpy() for name, x in fields.items()}


@torch.no_grad()
def our_detections(model: nn.Module, batch: list[dict], names: Iterable[str]) -> dict:
    found = arrays_of(model.eval()(batch)[0]["instances"])
    return {name: found[name] * 1.0 if name == "masks" else found[name] for name in names}


def compare(case: Case) -> Comparison:
    torch.manual_seed(0)
    their_cfg = mmdet_config(case.theirs)
    sample_all(their_cfg)
    cfg = get_config(case.ours, [*TAKE_ALL, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    theirs = build_mmdet(their_cfg).model
    randomize(theirs)
    ours, complaints = converted(case, cfg, their_cfg, theirs)

    size = (cfg.INPUT.SQUARE_SIZE,) * 2 if "ssd" in case.ours else SIZE
    their_batch, our_batch = random_batch(size, 2, cfg.INPUT.FORMAT)
    expected = detections_of_mmdet(theirs, their_batch[:1])
    detections = our_detections(ours, our_batch[:1], expected)
    found = agreement([expected], [detections], cfg.TEST.DETECTIONS_PER_IMAGE, THRESHOLD)
    expected, losses = losses_of_mmdet(theirs, their_batch), our_losses(ours, our_batch)
    differences = {
        name: abs(losses[our_name] / expected[name] - 1) for name, our_name in case.losses.items()
    }
    return Comparison(found, differences, complaints)


def sample_all(cfg: Any) -> None:
    """Let the samplers of an R-CNN draw everything."""
    train = cfg.model.get("train_cfg") or {}
    if "rpn" not in train:
        return
    stages = train.rcnn if isinstance(train.rcnn, list) else [train.rcnn]
    for part in (train.rpn, *stages):
        part.sampler.num = ALL


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [case.ours for case in CASES]
    parser.add_argument("names", nargs="*", metavar="CONFIG", help=", ".join(known))
    names = parser.parse_args(argv).names
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{unknown[0]!r} is no config here; there are {', '.join(known)}.")
    if told := missing("mmdetection"):
        sys.exit(told)
    compared = {case.ours: compare(case) for case in CASES if not names or case.ours in names}
    print(tabulate([x.row(name) for name, x in compared.items()], HEADERS, "github"))
    for name, comparison in compared.items():
        for complaint in comparison.complaints:
            print(f"{name}: {complaint}")
    if differing := [name for name, comparison in compared.items() if not comparison.holds()]:
        sys.exit(f"These and their conversions do not agree: {', '.join(differing)}.")


if __name__ == "__main__":
    main()
