"""What IoU-Net costs: its NMS beside torchvision's, and its parts beside the detector's forward.

    python benchmarks/iou_net.py [--config FILE] [--height PIXELS] [--width PIXELS] [--rounds N]
        [--device cpu|cuda]

The rows of each table take turns; medians over rounds. "forward" is all of Faster R-CNN on one
image, with 1000 proposals that it is given, for of random weights the RPN has few; refinement moves
100 boxes by 5 steps without an early stop, which is the most it can cost. "layers alone" are the
matrix products of the branch, below which its row cannot come.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable

import torch
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from torchvision.ops import batched_nms

from common import add_device, build, in_turn, machine
from iou_d2.detectors.iou_net_inference import GradientAscent, Postprocessor, predict_ious
from iou_d2.detectors.iou_net_nms import GuidedNMS, PlainNMS
from iou_d2.engine.memory import keep_freed_memory
from iou_d2.layers.suppressors import first_suppressors
from iou_d2.ops.jitter import jittered_boxes
from iou_d2.ops.nms import iou_guided_nms

DETECTIONS, CANDIDATES = 100, 1000


def medians(parts: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median milliseconds of each part."""
    times = in_turn(parts, rounds)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def random_boxes(count: int, height: int, width: int, objects: int = 0) -> torch.Tensor:
    """(count, 4) all over the image, or close to `objects` places."""
    corner = torch.rand(objects or count, 2) * torch.tensor([width, height]) * 0.8
    size = 30 + torch.rand(objects or count, 2) * 100
    boxes = torch.cat([corner, corner + size], dim=1)
    if objects:
        boxes = boxes.repeat(count // objects, 1) + torch.randn(count, 4) * 5
    return boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))


def nms_table(rounds: int, device: str) -> str:
    rows = []
    for count in (CANDIDATES, 10_000):
        for classes in (1, 80):
            for objects in (0, count // 50):
                boxes = random_boxes(count, 800, 1333, objects).to(device)
                scores, ranks = torch.rand(2, count, device=device)
                labels = (torch.arange(count, device=device) % (objects or count)) % classes
                times = medians(
                    {
                        "plain": lambda b=boxes, r=ranks, c=labels: batched_nms(b, r, c, 0.5),
                        "guided": lambda b=boxes, s=scores, r=ranks, c=labels: iou_guided_nms(
                            b, s, r, c, 0.5, first_suppressors
                        ),
                    },
                    rounds,
                )
                kept = len(batched_nms(boxes, ranks, labels, 0.5))
                place = f"around {objects} objects" if objects else "anywhere"
                ratio = times["guided"] / times["plain"]
                rows.append([count, place, classes, kept, *times.values(), ratio])
    names = ["boxes", "place", "classes", "kept", "batched_nms (ms)", "guided (ms)", "ratio"]
    return tabulate(rows, names, "pipe", floatfmt=".2f")


def random_instances(
    count: int, size: tuple[int, int], device: torch.device, objects: int = 0
) -> list[Instances]:
    """What stands for the proposals, candidates or detections of one image."""
    boxes = Boxes(random_boxes(count, *size, objects)).to(device)
    classes = torch.zeros(count, dtype=torch.int64, device=device)
    scores = torch.rand(count, device=device)
    fields = {"pred_boxes": boxes, "pred_classes": classes, "scores": scores}
    return [Instances(size, **fields, pred_ious=scores, proposal_boxes=boxes)]


def run_layers(branch, pooled: torch.Tensor, forward: int = 1, backward: int = 0) -> None:
    """The matrix products of a branch, so many times."""
    for _ in range(forward):
        hidden = branch.head(pooled)
        branch.iou_pred(hidden)
    for _ in range(backward):
        gradient = hidden @ branch.head.fc2.weight
        gradient @ branch.head.fc1.weight


@torch.no_grad()
def model_table(model, height: int, width: int, rounds: int) -> str:
    image = {"image": torch.randint(256, (3, height, width), dtype=torch.uint8)}
    heads, branch = model.roi_heads, model.roi_heads.iou_branch
    plain, guided = Postprocessor(PlainNMS(0.5)), Postprocessor(GuidedNMS(0.5))
    ascent = GradientAscent(steps=5, early_stop=0.0, max_drop=-float("inf"))
    features = heads.levels(model.backbone(model.preprocess_image([image]).tensor))
    size = features[0].shape[2] * 4, features[0].shape[3] * 4

    make = functools.partial(random_instances, size=size, device=model.device)
    detections, candidates, crowded = (
        make(DETECTIONS),
        make(CANDIDATES),
        make(CANDIDATES, objects=20),
    )
    proposals = make(1000)

    def forward():
        images = model.preprocess_image([image])
        maps = model.backbone(images.tensor)
        model.proposal_generator(images, maps, None)
        heads.regress(maps, proposals)

    gt = random_boxes(8, *size).to(model.device)
    pooled = [branch.pooler(features, [x[0].pred_boxes]) for x in (candidates, detections)]
    steps = ascent.steps
    parts = {
        "forward of the detector, without its NMS": forward,
        f"plain NMS, {CANDIDATES} boxes": lambda: plain.suppress(candidates[0]),
        f"IoU-guided NMS, {CANDIDATES} boxes": lambda: guided.suppress(candidates[0]),
        f"predicted IoU, {CANDIDATES} boxes": lambda: predict_ious(candidates, branch, features),
        "- its layers alone": lambda: run_layers(branch, pooled[0]),
        "- of those anywhere that NMS needs": lambda: guided.judge(candidates, branch, features),
        "- of those around 20 objects": lambda: guided.judge(crowded, branch, features),
        f"refinement, {DETECTIONS} boxes": lambda: ascent(detections, branch, features),
        "- the layers alone": lambda: run_layers(branch, pooled[1], steps + 1, steps),
        "jittered boxes, 1000 of one image": lambda: jittered_boxes(
            gt, size, branch.offsets, per_gt=250, per_image=1000
        ),
    }
    times = medians(parts, rounds)
    whole = next(iter(times.values()))
    rows = [[name, value, 100 * value / whole] for name, value in times.items()]
    return tabulate(rows, ["part", "ms", "% of forward"], "pipe", floatfmt=".2f")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/iou_net_R_50_FPN_1x.yaml", metavar="FILE")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--rounds", type=int, default=5)
    add_device(parser)
    arguments = parser.parse_args()
    keep_freed_memory()  # as the commands do

    model = build(arguments.config, arguments.device, ["MODEL.RESNETS.NORM", "BN"]).eval()
    print(
        f"{arguments.config}, {arguments.height} x {arguments.width} px, "
        f"{machine(arguments.device)}, median of {arguments.rounds} rounds\n"
    )
    print(model_table(model, arguments.height, arguments.width, arguments.rounds), flush=True)
    print()
    print(nms_table(arguments.rounds, arguments.device))


if __name__ == "__main__":
    main()
