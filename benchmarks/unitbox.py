"""What it takes to train UnitBox with VGG-16 at full size: memory and seconds of a step.

    python benchmarks/unitbox.py [--config FILE] [--height H] [--width W] [--batch N] [--classes K]

Prints the peak of the process (on a GPU: of what torch allocates) over two steps of forward,
backward and SGD with momentum, and the share of the model and the libraries before them.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from tabulate import tabulate

from iou_d2 import get_config


def peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if platform.system() == "Darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def random_batch(images: int, height: int, width: int, classes: int, objects: int = 20):
    batch = []
    for _ in range(images):
        corner = torch.rand(objects, 2) * torch.tensor([width, height]) * 0.7
        truth = Instances((height, width))
        truth.gt_boxes = Boxes(torch.cat([corner, corner + 10 + torch.rand(objects, 2) * 200], 1))
        truth.gt_classes = torch.randint(classes, (objects,))
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": truth})
    return batch


def step_seconds(model, optimizer, batch) -> float:
    start = time.perf_counter()
    losses = model(batch)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/unitbox_vgg16_faces.yaml", metavar="FILE")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--classes", type=int, default=1)
    args = parser.parse_args()

    overrides = ["MODEL.WEIGHTS", "", "MODEL.UNITBOX.NUM_CLASSES", str(args.classes)]
    cfg = get_config(args.config, overrides)
    model = build_model(cfg).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8, momentum=0.9)
    batch = random_batch(args.batch, args.height, args.width, args.classes)
    before = peak_gib()
    seconds = [step_seconds(model, optimizer, batch) for _ in range(2)]

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {cfg.MODEL.DEVICE}")
    row = [f"{args.batch} x {args.height} x {args.width}", args.classes]
    row += [f"{before:.2f}", f"{peak_gib():.2f}", f"{min(seconds):.1f}"]
    headers = ["images", "classes", "GiB before", "GiB at the peak", "s a step"]
    print(tabulate([row], headers, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
