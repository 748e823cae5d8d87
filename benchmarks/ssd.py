"""SSD300 beside torchvision's, and RefineDet320 alone, in turn, in one process.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 python benchmarks/ssd.py [--batch N] [--rounds N]
        [--device cpu|cuda]

Prints the median and the lowest and highest seconds of a training step (forward, backward, SGD) and
of the inference of an image, and the median over rounds of the ratio to torchvision. Both SSDs have
the same random weights, 80 classes, pixels and rules of inference; all layers are trained.
RefineDet, which torchvision has not, does more: two heads, and blocks between them.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from tabulate import tabulate
from torchvision.models.detection import ssd300_vgg16

from adapters import (
    TorchvisionDetector,
    copy_weights,
    inference_in_turn,
    torchvision_batch,
    training_in_turn,
)
from common import add_device, build, machine, random_batch

CLASSES = 80
PEER = "torchvision"
SETTINGS = ("MODEL.RETINANET.NUM_CLASSES", str(CLASSES))


def build_pair(side: int, device: str) -> tuple[TorchvisionDetector, torch.nn.Module]:
    """torchvision's SSD300 for images of `side`, and ours with its weights."""
    torch.manual_seed(0)
    peer = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES + 1)
    peer.transform.min_size, peer.transform.max_size = (side,), side
    peer.transform.fixed_size = (side, side)
    ours = build(
        "configs/torchvision/ssd300_VGG16.yaml",
        device,
        (*SETTINGS, "INPUT.SQUARE_SIZE", str(side)),
    )
    peer = TorchvisionDetector(peer).to(device)
    copy_weights(peer, ours)
    return peer, ours


def rows_of(times: dict[str, list[float]], what: str) -> list[list[str]]:
    rows = []
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times[PEER]))
        spread = f"{min(values):.3f} - {max(values):.3f}"
        rows.append([what, name, f"{statistics.median(values):.3f}", spread, f"{ratio:.2f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=300, help="pixels of SSD's square images")
    parser.add_argument("--batch", type=int, default=8, help="images of a training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-refinedet", action="store_true", help="leave RefineDet320 out")
    add_device(parser)
    arguments = parser.parse_args()

    device = arguments.device
    peer, ours = build_pair(arguments.side, device)
    models = {PEER: peer, "SSD": ours}
    batch = random_batch(arguments.batch, arguments.side, arguments.side, CLASSES)
    batches = {PEER: torchvision_batch(batch, device), "SSD": batch}
    if not arguments.no_refinedet:
        models["RefineDet"] = build("configs/refinedet320_VGG16_coco.yaml", device)
        batches["RefineDet"] = random_batch(arguments.batch, 320, 320, CLASSES)

    training = training_in_turn(models, batches, arguments.rounds)
    single = {name: entries[:1] for name, entries in batches.items()}
    inference = inference_in_turn(models, single, arguments.rounds)
    print(f"{arguments.side} px, {machine(device)}, {arguments.rounds} rounds")
    rows = rows_of(training, f"training step, {arguments.batch} images")
    rows += rows_of(inference, "inference, 1 image")
    print(tabulate(rows, ["", "", "seconds", "from - to", "ratio"], "pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
