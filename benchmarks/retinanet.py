"""What the IoU head costs: plain RetinaNet beside IoU-aware RetinaNet, in turn, in one process.

    python benchmarks/retinanet.py [--config NAME] [--side PIXELS] [--batch N] [--rounds N]
        [--device cpu|cuda]

Prints the median seconds of a training step (forward, backward, SGD) and of the inference of an
image, and the median over rounds of the ratio IoU-aware / plain. alpha is 1, so that both detect
the same.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from tabulate import tabulate

from common import add_device, build, in_turn, inference_runs, machine, random_batch, training_runs

CONFIGS = {
    "shapes": ("configs/quick/retinanet_shapes.yaml", "configs/quick/iou_retinanet_shapes.yaml"),
    "R50": ("configs/retinanet_R_50_FPN_1x.yaml", "configs/iou_retinanet_R_50_FPN_1x.yaml"),
}
ALPHA = ("MODEL.IOU_RETINANET.ALPHA", "1.0")


def row(name: str, times: dict[str, list[float]]) -> list[str]:
    plain, aware = times["RetinaNet"], times["IoU-aware"]
    ratio = statistics.median(b / a for a, b in zip(plain, aware))
    return [name, *(f"{statistics.median(x):.4f}" for x in (plain, aware)), f"{ratio:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", choices=CONFIGS, default="shapes")
    parser.add_argument("--side", type=int, default=160, help="pixels of the square images")
    parser.add_argument("--batch", type=int, default=8, help="images of a training step")
    parser.add_argument("--rounds", type=int, default=20)
    add_device(parser)
    arguments = parser.parse_args()

    device = arguments.device
    plain, aware = (build(path, device, ALPHA) for path in CONFIGS[arguments.config])
    models = {"RetinaNet": plain, "IoU-aware": aware}
    batch = random_batch(arguments.batch, arguments.side, arguments.side, classes=2)
    training = in_turn(training_runs(models, batch), arguments.rounds)
    # With equal weights and alpha = 1 both detect the same, and NMS costs both the same.
    aware.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        inference = in_turn(inference_runs(models, batch[:1]), arguments.rounds)

    print(
        f"{arguments.config}, {arguments.side} px, {machine(device)}, "
        f"median of {arguments.rounds} rounds"
    )
    rows = [
        row(f"training step, {arguments.batch} images", training),
        row("inference, 1 image", inference),
    ]
    print(tabulate(rows, ["seconds", *models, "ratio"], "pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
