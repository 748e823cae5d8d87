"""What the IoU head costs: plain RetinaNet beside IoU-aware RetinaNet, in turn, in one process.

    python benchmarks/retinanet.py [--config NAME] [--side PIXELS] [--batch N] [--rounds N]

Prints the median seconds of a training step (forward, backward, SGD) and of the inference of an
image, and the median over rounds of the ratio IoU-aware / plain. alpha is 1, so that both detect
the same.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from iou_d2 import get_config

PAIRS = {
    "shapes": ("configs/quick/retinanet_shapes.yaml", "configs/quick/iou_retinanet_shapes.yaml"),
    "R50": ("configs/retinanet_R_50_FPN_1x.yaml", "configs/iou_retinanet_R_50_FPN_1x.yaml"),
}


def build(config_file: str):
    cfg = get_config(config_file, ["MODEL.WEIGHTS", "", "MODEL.IOU_RETINANET.ALPHA", "1.0"])
    torch.manual_seed(0)
    return build_model(cfg)


def random_batch(images: int, side: int, objects: int = 8) -> list[dict]:
    batch = []
    for _ in range(images):
        corner = torch.rand(objects, 2) * side * 0.6
        truth = Instances((side, side))
        truth.gt_boxes = Boxes(torch.cat([corner, corner + 12 + torch.rand(objects, 2) * 60], 1))
        truth.gt_classes = torch.randint(2, (objects,))
        image = torch.randint(256, (3, side, side), dtype=torch.uint8)
        batch.append({"image": image, "instances": truth, "height": side, "width": side})
    return batch


def seconds(function) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def training_step(model, optimizer, batch) -> None:
    losses = model(batch)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()


def compare(models: list, run, rounds: int) -> list[list[float]]:
    """Seconds of each model in each round; the models take turns, and one round is not counted."""
    times = [
        [seconds(lambda model=model: run(model)) for model in models] for _ in range(rounds + 1)
    ]
    return times[1:]


def row(name: str, times: list[list[float]]) -> list:
    plain, aware = (statistics.median(t[i] for t in times) for i in range(2))
    ratio = statistics.median(aware / plain for plain, aware in times)
    return [name, f"{plain:.4f}", f"{aware:.4f}", f"{ratio:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", choices=PAIRS, default="shapes")
    parser.add_argument("--side", type=int, default=160, help="pixels of the square images")
    parser.add_argument("--batch", type=int, default=8, help="images of a training step")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()

    plain, aware = models = [build(config_file) for config_file in PAIRS[arguments.config]]
    # With equal weights and alpha = 1 both detect the same, and NMS costs both the same.
    aware.load_state_dict(plain.state_dict(), strict=False)
    optimizers = {model: torch.optim.SGD(model.parameters(), lr=1e-6) for model in models}
    batch = random_batch(arguments.batch, arguments.side)
    with EventStorage():
        for model in models:
            model.train()
        training = compare(
            models, lambda model: training_step(model, optimizers[model], batch), arguments.rounds
        )
    aware.load_state_dict(plain.state_dict(), strict=False)
    for model in models:
        model.eval()
    with torch.no_grad():
        inference = compare(models, lambda model: model(batch[:1]), arguments.rounds)

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(
        f"{arguments.config}, {arguments.side} px, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {device or platform.machine()}, "
        f"median of {arguments.rounds} rounds"
    )
    rows = [
        row(f"training step, {arguments.batch} images", training),
        row("inference, 1 image", inference),
    ]
    print(tabulate(rows, ["seconds", "RetinaNet", "IoU-aware", "ratio"], disable_numparse=True))


if __name__ == "__main__":
    main()
