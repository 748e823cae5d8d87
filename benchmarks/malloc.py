"""What it saves to keep freed memory for the next tensor, and what it takes.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 python benchmarks/malloc.py [--configs NAME ...]
        [--size HxW] [--images N] [--repeats N] [--rounds N] [--precision bfloat16]

Processes take turns, of which one has `keep_freed_memory` (iou_d2/engine/memory.py) as the commands
do, one is as glibc comes, and one keeps memory in huge pages, too (THP_MEM_ALLOC_ENABLE of torch).
Each gives the median seconds of one image and of one training step, whose images are of 0.8 to 1
of the size, no two alike, and the most memory that it had. Prints the medians over the rounds, and
the median and the extremes of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator

import torch
from tabulate import tabulate

from common import build, machine, peak_gib, random_batch, seconds, training_step
from iou_d2.engine.memory import keep_freed_memory

# How -> whether memory is kept, and what is added to the environment.
HOWS = {
    "as glibc comes": (False, {}),
    "freed memory kept": (True, {}),
    "kept, in huge pages": (True, {"THP_MEM_ALLOC_ENABLE": "1"}),
}
FIGURES = ("image, s", "step, s", "peak of images, GiB", "peak of steps, GiB")
CONFIGS = ["quick/vfnet_own_data", "quick/iou_net_own_data", "vfnet_R_50_FPN_1x"]


def batches(args: argparse.Namespace, count: int) -> Iterator[list[dict]]:
    """So many batches, of images whose size no other batch has."""
    height, width = map(int, args.size.split("x"))
    draw = random.Random(0)
    for _ in range(count):
        share = draw.uniform(0.8, 1.0)
        yield random_batch(args.images, int(height * share), int(width * share), args.classes)


def measure(config: str, args: argparse.Namespace) -> list[float]:
    """FIGURES of this process. The first two images and steps do not count: all is new to them."""
    overrides = ["DATASETS.TRAIN", "('coco_2017_train',)", "MODEL.PRECISION", args.precision]
    if config.startswith("quick/"):
        overrides += ["MODEL.RETINANET.NUM_CLASSES", str(args.classes)]
        overrides += ["MODEL.ROI_HEADS.NUM_CLASSES", str(args.classes)]
    model = build(config, "cpu", overrides).eval()
    with torch.no_grad():
        images = [seconds(lambda x=x: model(x[:1])) for x in batches(args, args.repeats + 2)]
    after_images = peak_gib("cpu")
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)
    steps = [
        seconds(lambda x=x: training_step(model, optimizer, x))
        for x in batches(args, args.repeats + 2)
    ]
    medians = [statistics.median(times[2:]) for times in (images, steps)]
    return [*medians, after_images, peak_gib("cpu")]


def in_own_process(how: str, config: str) -> list[float]:
    """FIGURES of a process that does `how`."""
    _, environment = HOWS[how]
    done = subprocess.run(
        [sys.executable, *sys.argv, "--configs", config, "--how", how],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def row(how: str, rounds: list[dict[str, list[float]]]) -> list[str]:
    """Medians of FIGURES, and of their ratios to the first of HOWS with the extremes."""
    cells = [how]
    for index in range(len(FIGURES)):
        values = [figures[how][index] for figures in rounds]
        ratios = [x / figures[next(iter(HOWS))][index] for x, figures in zip(values, rounds)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        cells.append(f"{statistics.median(values):.3g}, {middle:.2f} ({low:.2f} - {high:.2f})")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--configs", nargs="*", default=CONFIGS, metavar="NAME")
    add("--size", default="800x1333", metavar="HxW")
    add("--images", type=int, default=1, metavar="N", help="of a training step")
    add("--classes", type=int, default=80)
    add("--repeats", type=int, default=3, help="of an image and of a step in each process")
    add("--rounds", type=int, default=3)
    add("--precision", default="float32")
    add("--how", choices=HOWS, help="measure this in this process alone")
    args = parser.parse_args()
    if args.how:
        if HOWS[args.how][0]:
            keep_freed_memory()
        print(json.dumps(measure(args.configs[0], args)))
        return
    print(f"{machine()}, {args.size}, {args.precision}, {args.images} images a step\n")
    for config in args.configs:
        rounds = [{how: in_own_process(how, config) for how in HOWS} for _ in range(args.rounds)]
        print(f"{config}, median of {args.rounds} rounds, ratio\n")
        print(tabulate([row(how, rounds) for how in HOWS], ["", *FIGURES]) + "\n", flush=True)


if __name__ == "__main__":
    main()
